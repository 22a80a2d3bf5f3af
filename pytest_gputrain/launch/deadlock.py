"""Who can never go on again. Pure: what each rank has entered and where it is in, a set of ranks out.

A rank that waits is *stuck* when what it waits for needs a rank that has ended, or one that is itself stuck.
That is proved from the records and not guessed from idleness: with NCCL a rank that waits burns CPU, and a
rank that sleeps may yet come. A rank that can still act of itself is never stuck, and frees whom it may free.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

Key = tuple[str, int, int, int]
"""A collective: its group's name, first rank and size (all ranks would be slow to compare), its number."""
Shape = tuple[str, tuple[tuple[int, ...], ...], tuple[str, ...]]
_SAME_SIZES = frozenset(
    {"all_reduce", "broadcast", "reduce", "all_gather", "all_gather_into_tensor", "reduce_scatter_tensor"}
)
"""Operations whose input has the same size on every rank; the others may legally differ."""
_P2P = frozenset({"send", "recv", "isend", "irecv", "batch_isend_irecv"})


class Call(NamedTuple):
    """One collective as one rank called it; ``seq`` is None for point-to-point, ``ranks`` then the pair."""

    seq: int | None
    op: str
    sizes: tuple[tuple[int, ...], ...] = ()
    dtypes: tuple[str, ...] = ()
    group: str = "0"
    ranks: tuple[int, ...] = ()
    waiting: bool = False
    location: str | None = None
    note: str | None = None
    root: int | None = None

    @property
    def key(self) -> Key:
        """What makes it the same collective on other ranks."""
        return self.group, self.ranks[0] if self.ranks else -1, len(self.ranks), self.seq or 0

    @property
    def shape(self) -> Shape:
        """What has to be the same on all of its ranks."""
        if self.op not in _SAME_SIZES:
            return self.op, (), ()
        return self.op, self.sizes, self.dtypes

    def name(self) -> str:
        """``all_reduce #7``, with the group where it is not the default one."""
        if self.seq is None:
            return f"{self.op} ({self.ranks[0]} to {self.ranks[-1]})" if self.ranks else self.op
        return f"{self.op} #{self.seq}" + (f" of group {self.group}" if self.group != "0" else "")

    def tensors(self) -> str:
        """``128 x float32``, ``2 x 3 x int64``, ``3 tensors, the first 128 x float32``; empty without one."""
        if not self.sizes:
            return ""
        size = " x ".join(map(str, self.sizes[0])) or "1"
        first = f"{size} x {self.dtypes[0]}" if self.dtypes else size
        return first if len(self.sizes) == 1 else f"{len(self.sizes)} tensors, the first {first}"

    def __str__(self) -> str:
        """``all_reduce #7 (128 x float32)``."""
        tensors = self.tensors()
        return f"{self.name()} ({tensors})" if tensors else self.name()


BACKWARD = "backward"
"""Where a rank is that is still in autograd's engine and, by its records, in no collective."""


@dataclass
class Scene:
    """One rank at one moment.

    ``blocked``: its main thread waits in torch for others, and no other thread of it does anything.
    ``waits_in``: the torch function in which it waits, by the stack, for what no record says.
    ``complete``: the records hold every collective, and not only those that Python calls.
    ``peers``: of a rank that waits for a handle of a message: all with whom it has exchanged any.
    ``all_messages``: the records hold every message.
    ``handles``: the exception that its main thread is handling (in ``except``, ``finally``), and its line.
    """

    rank: int
    state: Literal["running", "returned", "raised", "gone"] = "running"
    blocked: bool = False
    location: str | None = None
    source: str = ""
    waits_in: str | None = None
    calls: Sequence[Call] = field(default_factory=list)
    complete: bool = True
    peers: tuple[int, ...] = ()
    all_messages: bool = True
    handles: str | None = None

    def pending(self) -> list[Call]:
        """What it has entered and not finished; several where calls are asynchronous."""
        return [call for call in self.calls if call.waiting and call.seq is not None]

    def last_message(self) -> Call | None:
        """The point-to-point call in which it waits, where its record says to or from whom."""
        if self.waits_in not in _P2P or len(self.peers) > 1:
            return None
        return next((call for call in reversed(self.calls) if call.seq is None), None)

    def waited(self) -> Call | None:
        """What its main thread waits for: the pending call of that line, else the oldest; None if unknown.

        For a rank whose wait was cut off by an exception, the last call of the line that raised it.
        """
        if self.state == "raised" and self.calls and self.calls[-1].location == self.location:
            return self.calls[-1] if self.calls[-1].seq is not None else None
        messages = self.waits_in in _P2P or self.peers
        pending = self.pending() if self.blocked and not messages else []
        here = [call for call in pending if call.location == self.location]
        return next(iter(here or pending), None)


class Entries:
    """Which rank has entered which collective."""

    def __init__(self, scenes: Mapping[int, Scene]) -> None:
        self.by_key: dict[Key, dict[int, Call]] = {}
        self._last: dict[tuple[int, tuple[str, int, int]], int] = {}
        for rank, scene in scenes.items():
            last: dict[tuple[str, int, int], int] = {}
            for call in scene.calls:
                if call.seq is None:
                    continue
                key = call.key
                if (there := self.by_key.get(key)) is None:
                    there = self.by_key[key] = {}
                there[rank] = call
                last[key[:3]] = call.seq
            self._last.update({(rank, group): seq for group, seq in last.items()})

    def last(self, rank: int, call: Call) -> int:
        """The number of the last collective that a rank has entered in the call's group; 0 for none."""
        return self._last.get((rank, call.key[:3]), 0)

    def missing(self, call: Call) -> list[int]:
        """The ranks of the call's group that have not entered it; one that is further on has, once."""
        there = self.by_key.get(call.key, {})
        return [rank for rank in call.ranks if rank not in there and self.last(rank, call) < (call.seq or 0)]

    def differs(self, call: Call) -> bool:
        """Whether some rank entered something else under the same number."""
        return unlike(self.by_key.get(call.key, {}).values())


def unlike(calls: Iterable[Call]) -> bool:
    """Whether calls that met under one number were not the same."""
    found = list(calls)
    return any(call.shape != found[0].shape for call in found) or len(roots(found)) > 1


def roots(calls: Iterable[Call]) -> set[int]:
    """The roots that calls of one number name; C++ names none."""
    return {call.root for call in calls if call.root is not None}


def stuck(scenes: Mapping[int, Scene]) -> dict[int, bool]:
    """The running ranks that can never go on, each with whether records (and not only stacks) say so."""
    entries = Entries(scenes)
    helpless = {rank for rank, scene in scenes.items() if scene.blocked or scene.state != "running"}
    while True:
        waiting = [rank for rank in helpless if scenes[rank].state == "running"]
        freed = {rank for rank in waiting if _may_go_on(scenes[rank], helpless, scenes, entries)}
        if not freed:
            return {rank: _proved(scenes[rank], scenes, entries) for rank in sorted(waiting)}
        helpless -= freed


def _may_go_on(scene: Scene, helpless: set[int], scenes: Mapping[int, Scene], entries: Entries) -> bool:
    if scene.waited() is None:
        return _may_be_met(scene, helpless, scenes)
    # Of several pending calls any may be the one that is waited for.
    return any(
        not entries.differs(call) and all(_may_come(rank, helpless, scenes) for rank in entries.missing(call))
        for call in scene.pending()
    )


def _may_come(rank: int, helpless: set[int], scenes: Mapping[int, Scene]) -> bool:
    # A rank on another host, of which nothing is known, may always come.
    return rank not in helpless or rank not in scenes


def _may_be_met(scene: Scene, helpless: set[int], scenes: Mapping[int, Scene]) -> bool:
    """For a wait that no collective explains: a message, a store, the making of a group."""
    others = [rank for rank in scene.peers or scenes if rank != scene.rank]
    if (last := scene.last_message()) is not None and set(last.ranks) <= set(scenes):
        others = [rank for rank in last.ranks if rank != scene.rank]
    return any(rank not in helpless for rank in others)


def _proved(scene: Scene, scenes: Mapping[int, Scene], entries: Entries) -> bool:
    if (message := scene.last_message()) is not None:
        # A message that is under way may yet come; one that the other side never called for cannot.
        pair = [scenes[rank] for rank in message.ranks if rank in scenes]
        counts = {seen.rank: _messages(seen, message) for seen in pair if seen.all_messages}
        mine = counts.pop(scene.rank, 0)
        return len(counts) == 1 and mine > min(counts.values())
    call = scene.waited()
    return call is not None and (bool(entries.missing(call)) or entries.differs(call))


def _messages(scene: Scene, message: Call) -> int:
    """How many messages from the same sender to the same receiver a rank has sent or received."""
    return sum(call.seq is None and call.ranks == message.ranks for call in scene.calls)


def fingerprint(scenes: Mapping[int, Scene], ranks: Iterable[int]) -> list[Any]:
    """What must be the same in a second look for nothing to have moved."""
    return [
        (rank, scene.location, scene.waits_in, len(scene.calls), [call.key for call in scene.pending()])
        for rank, scene in sorted(scenes.items())
        if rank in set(ranks)
    ]


def from_json(records: Iterable[Mapping[str, Any]]) -> list[Call]:
    """Records of a rank as ``collectives.json`` holds them, without those of a group that was made anew."""
    last: dict[str, int] = {}
    members: dict[str, tuple[Any, tuple[int, ...]]] = {}
    order: list[Call] = []
    for record in records:
        seq, group, ranks = record["seq"], record["group"], record["ranks"]
        if seq is not None:
            if last.get(group, 0) >= seq:  # destroyed and made again: it counts from 1
                order = [old for old in order if old.group != group]
            last[group] = seq
        known = members.get(group)
        if known is None or known[0] != ranks:
            members[group] = known = (ranks, tuple(ranks))
        order.append(
            Call(
                seq,
                record["op"],
                tuple(map(tuple, record["sizes"])),
                tuple(record["dtypes"]),
                group,
                known[1],  # one tuple for all: of 512 ranks it would be the larger part
                record["state"] == "waiting",
                record["location"],
                record.get("note"),
                record.get("root"),
            )
        )
    return order
