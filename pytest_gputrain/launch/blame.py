"""From what every rank has entered to who did it, in words. Pure, like ``deadlock.py``.

In this order: ranks that called different things under the same number; a rank that never came to what others
wait in; ranks that wait for each other. With two ranks nobody can tell which one is wrong: both sides are
said. With more, the odd one out is named.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from . import likely
from .deadlock import BACKWARD, Call, Entries, Scene, unlike
from .output import rank_list
from .records import Cause


@dataclass(frozen=True)
class Finding:
    """The cause, and what is likely behind it."""

    cause: Cause
    advice: str = ""


def explain(scenes: Mapping[int, Scene]) -> Finding | None:
    """What holds a launch up; None where the ranks' records and stacks do not tell."""
    entries = Entries(scenes)
    found = desync(scenes, entries) or _absent(scenes, entries) or _silent(scenes) or _circle(scenes, entries)
    if found is None:
        return None
    return _with_exceptions(scenes, Finding(*found))


def _with_exceptions(scenes: Mapping[int, Scene], finding: Finding) -> Finding:
    """With the exceptions that only some ranks are handling: a ``finally`` hides what went wrong."""
    handling = [rank for rank, scene in sorted(scenes.items()) if scene.handles and scene.state == "running"]
    if not handling or len(handling) == len(scenes):
        return finding
    cause, verb = finding.cause, "is" if len(handling) == 1 else "are"
    text = f"{cause.message}; {rank_list(handling)} {verb} handling {scenes[handling[0]].handles}"
    told = Cause(cause.rank, cause.kind, text, cause.location)
    if cause.rank is not None and cause.rank not in handling:
        return Finding(told, finding.advice)
    return Finding(told, likely.of_exception(rank_list(handling), len(handling)))


def desync(scenes: Mapping[int, Scene], entries: Entries | None = None) -> tuple[Cause, str] | None:
    """The first collective that was not the same on all of its ranks, whether or not it got through."""
    entries = entries or Entries(scenes)
    wrong = [key for key, calls in entries.by_key.items() if unlike(calls.values())]
    if not wrong:
        return None
    calls = entries.by_key[min(wrong, key=lambda key: key[3])]
    rooted = len({call.shape for call in calls.values()}) == 1
    sides: dict[object, list[int]] = {}
    for rank, call in sorted(calls.items()):
        if not rooted or call.root is not None:
            sides.setdefault(call.root if rooted else call.shape, []).append(rank)
    many, *few = sorted(sides.values(), key=len, reverse=True)
    odd = few[0]
    usual, other = calls[many[0]], calls[odd[0]]
    known = len(many) * 2 > len(calls)  # two ranks accuse each other
    if rooted:
        text = f"{rank_list(odd)} called {other.name()} with rank {other.root} as its root where "
        text += f"{rank_list(many)} had rank {usual.root}"
        return Cause(odd[0] if known else None, "mismatch", text, other.location), likely.ROOTS
    same = other.op == usual.op
    advise = likely.of_sizes if same else likely.of_order
    advice = advise(scenes[odd[0]], scenes[many[0]], other, usual)
    if not known and likely.is_stranger(usual, scenes[odd[0]].calls, other, scenes[many[0]].calls):
        many, odd, usual, other = odd, many, other, usual
    text = f"{rank_list(odd)} called {other} where {rank_list(many)} called {usual}"
    if same:
        text = f"{rank_list(odd)} called {other.name()} with {other.tensors()} where {rank_list(many)} had "
        text += usual.tensors()
    if usual.location and not (same and usual.location == other.location):
        text += f" [{usual.location}]"
    return Cause(odd[0] if known else None, "mismatch" if same else "order", text, other.location), advice


def _absent(scenes: Mapping[int, Scene], entries: Entries) -> tuple[Cause, str] | None:
    """Ranks wait in a collective that a rank never came to, which itself waits for nobody."""
    for call, here in _waits(scenes):
        missing = entries.missing(call)
        roots = [rank for rank in missing if rank in scenes and not scenes[rank].blocked]
        if not roots:
            continue
        # One that is still at work explains more than one that has ended: it may have left without it.
        root = min(roots, key=lambda rank: (scenes[rank].state != "running", rank))
        advice = likely.of_absence(scenes, call, here[0], root)
        over = all(rank in scenes and scenes[rank].state != "running" for rank in missing)
        if over and len(call.ranks) > 2 and len(here) < len(missing):
            text = f"only {rank_list(here)} called {call}; {rank_list(missing)} never did and ended"
            return Cause(here[0], "alone", text, call.location), advice
        others = [rank for rank in roots if scenes[rank].state == scenes[root].state]
        text = f"{rank_list(others)} never reached {call}; {_doing(scenes[root], len(others))}"
        if (theirs := _of_a_side_thread(scenes[root], here, entries)) is not None:
            text += f" while a thread of it waits in {theirs}, which {rank_list(here)} never reached"
            where = theirs.location or scenes[root].location
            return Cause(None, "deadlock", text, where), likely.GROUPS
        if scenes[root].location is None:
            text += f"; {rank_list(here)} {'waits' if len(here) == 1 else 'wait'} in it"
            return Cause(root, _kind(scenes[root]), text, call.location), advice
        return Cause(root, _kind(scenes[root]), text, scenes[root].location), advice
    return None


def _of_a_side_thread(scene: Scene, waiting: list[int], entries: Entries) -> Call | None:
    """What a rank in Python has under way, to which the ranks that wait for it never came."""
    if scene.state != "running" or scene.blocked:
        return None
    return next((call for call in scene.pending() if set(waiting) <= set(entries.missing(call))), None)


def _waits(scenes: Mapping[int, Scene]) -> list[tuple[Call, list[int]]]:
    """What ranks wait in, with those ranks; the earliest of a group first."""
    found: dict[object, tuple[Call, list[int]]] = {}
    for rank, scene in sorted(scenes.items()):
        if (call := scene.waited()) is not None:
            found.setdefault(call.key, (call, []))[1].append(rank)
    return sorted(found.values(), key=lambda wait: wait[0].seq or 0)


def _silent(scenes: Mapping[int, Scene]) -> tuple[Cause, str] | None:
    """Ranks wait for a message, a store or a group that a rank which waits for nobody never came to."""
    for rank, scene in sorted(scenes.items()):
        if not scene.blocked or scene.waited() is not None or scene.waits_in is None:
            continue
        last = scene.last_message()
        others = last.ranks if last else scene.peers or scenes
        peers = [peer for peer in others if peer != rank and peer in scenes]
        roots = [peer for peer in peers if not scenes[peer].blocked]
        # One that failed on the very line did come there: its own error says more.
        came = [p for p in roots if scenes[p].state == "raised" and scenes[p].location == scene.location]
        if not roots or came:
            continue
        what = last.name() if last else scene.waits_in
        text = f"{rank_list(roots)} never answered {what} of rank {rank}"
        if not last and not scene.peers:
            text = f"{rank_list(roots)} never reached {what}, in which rank {rank} waits"
        text = f"{text}; {_doing(scenes[roots[0]], len(roots))}"
        where = scenes[roots[0]].location or scene.location
        return Cause(roots[0], _kind(scenes[roots[0]]), text, where), likely.of_wait(scene.waits_in)
    return None


def _circle(scenes: Mapping[int, Scene], entries: Entries) -> tuple[Cause, str] | None:
    """Every rank that is waited for waits itself."""
    blocked = {rank: scene for rank, scene in scenes.items() if scene.blocked and _goal(scene)}
    goals: dict[str, list[int]] = {}
    for rank, scene in sorted(blocked.items()):
        goals.setdefault(_goal(scene), []).append(rank)
    if len(blocked) < 2:
        return None
    many, *few = sorted(goals.values(), key=len, reverse=True)
    # Ranks that wait in what all have entered are held up by something that no record tells.
    entered = any(not entries.missing(call) for scene in blocked.values() if (call := scene.waited()))
    known = bool(few) and len(many) * 2 > len(blocked) and not entered
    parts = [f"{rank_list(ranks)} in {_goal_text(scenes[ranks[0]])}" for ranks in (*few[:3], many)]
    text = f"ranks wait for each other: {', '.join(parts)}"
    first = few[0][0] if few else many[0]
    calls = [call for scene in blocked.values() if (call := scene.waited())]
    several = len({call.group for call in calls}) > 1
    kind, advice = ("groups", likely.GROUPS) if several else ("deadlock", likely.DEADLOCK)
    if not few and calls and not any(entries.missing(call) for call in calls):
        return None  # all are in the same collective: a slow network, or a wire that lost it
    return Cause(first if known else None, kind, text, scenes[first].location), advice


def _goal(scene: Scene) -> str:
    call = scene.waited()
    return str(call) if call else scene.waits_in or ""


def _goal_text(scene: Scene) -> str:
    return f"{_goal(scene)} at {scene.location}" if scene.location else _goal(scene)


def _kind(scene: Scene) -> str:
    return "stuck" if scene.state == "running" else "left"


def _doing(scene: Scene, count: int) -> str:
    it = "it" if count == 1 else "they"
    return f"{it} {_did(scene, count)}"


def _did(scene: Scene, count: int = 1) -> str:
    if scene.state == "returned":
        return "returned from the function" if scene.location else "finished"
    if scene.state == "raised":
        return "raised an exception"
    if scene.state == "gone":
        return "ended without a report"
    verb = "is" if count == 1 else "are"
    if scene.waits_in == BACKWARD:
        return f"{verb} still in backward, and waits for no other rank"
    return f"{verb} still in Python" if scene.location else f"{verb} still running"


def fate(scene: Scene) -> str:
    """``waits in all_reduce #7 (128 x float32)   train.py:57 in step  loss.backward()  [in backward]``"""
    call = scene.waited()
    if scene.state == "raised":
        return f"in {call}" if call else ""
    count = sum(other.seq is not None for other in scene.calls)
    if scene.blocked:
        did = f"waits in {call or scene.waits_in or 'torch'}"
    elif scene.state == "running":
        where = "backward" if scene.waits_in == BACKWARD else "Python"
        did = f"is in {where} after {count} collectives"
    else:
        did = f"{_did(scene)} after {count} collectives"
    parts = [did, scene.location or "", scene.source]
    text = "   ".join(part for part in parts if part)
    return f"{text}   [{call.note}]" if call and call.note else text


def waiting_for(scenes: Mapping[int, Scene]) -> dict[int, str]:
    """``; rank 0 waits for it in all_reduce #7 (…) at …`` of each rank that holds others up."""
    entries = Entries(scenes)
    found: dict[int, str] = {}
    for call, here in _waits(scenes):
        verb = "waits" if len(here) == 1 else "wait"
        where = f" at {call.location}" if call.location else ""
        for rank in entries.missing(call):
            found.setdefault(rank, f"; {rank_list(here)} {verb} for it in {call}{where}")
    return found


def waits_in_vain(scenes: Mapping[int, Scene]) -> set[int]:
    """Ranks that wait in what not everybody has entered: CPU that they use meanwhile is no progress."""
    entries = Entries(scenes)
    return {rank for call, here in _waits(scenes) if entries.missing(call) for rank in here}
