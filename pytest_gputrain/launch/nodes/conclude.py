"""From what all nodes have told to one verdict: node 0 gives it, the others take it over."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from .. import scene
from ..deadlock import Scene
from ..output import rank_list
from ..records import Cause, RankResult, Verdict
from . import telling
from .meeting import Meeting

LIKELY_LOST = (
    "the machine went down, its network did, or gputrain was killed there; its own log and the kernel's "
    "(`dmesg`) on that machine tell which"
)


def all_ranks(
    meeting: Meeting, ranks: list[RankResult], scenes: Mapping[int, Scene], folder: Path
) -> tuple[list[RankResult], dict[int, Scene]]:
    """(ranks, scenes) of all nodes, as far as they have told; of this one alone where it is not node 0."""
    for rank in ranks:
        rank.node, rank.host = meeting.number, meeting.hosts.get(meeting.number)
    found = dict(scenes)
    if not meeting.leads:
        return ranks, found
    for report in meeting.reports.values():
        for told in report["scenes"]:
            one, records = telling.scene_told(told)
            found[one.rank] = one
            (folder / f"rank{one.rank}").mkdir(exist_ok=True)
            if records:
                scene.write(folder / f"rank{one.rank}" / scene.RECORDS, records)
    remote = meeting.remote_ranks()
    for rank in remote:
        _keep_output(rank, folder)
    return sorted([*ranks, *remote], key=lambda rank: rank.rank), found


def _keep_output(rank: RankResult, folder: Path) -> None:
    """The last words of a rank of another machine beside those of this one's."""
    path = folder / f"rank{rank.rank}"
    path.mkdir(exist_ok=True)
    for name in ("stdout", "stderr"):
        if text := getattr(rank, name):
            (path / f"{name}.log").write_text(text, encoding="utf-8", errors="backslashreplace")


def verdict(
    meeting: Meeting, ranks: list[RankResult], own: Verdict, cause: Cause | None, advice: str
) -> tuple[Verdict, Cause | None, str]:
    """(verdict, cause, advice) over all nodes. ``own`` is what the known ranks come to."""
    if not meeting.leads:
        return _taken_over(meeting)
    found = _of_a_node(meeting, ranks, own) or _missing(meeting, ranks, own) or (own, cause, advice)
    verdict, cause, advice = found[0], _with_node(found[1], ranks), found[2]
    told = [cause.rank, cause.kind, cause.message, cause.location] if cause else None
    meeting.tell_verdict(verdict=str(verdict), cause=told, advice=advice)
    return verdict, cause, advice


def _of_a_node(meeting: Meeting, ranks: list[RankResult], own: Verdict) -> tuple[Verdict, Cause, str] | None:
    """A node that went away is the cause, unless a rank of another one had failed by itself before."""
    if meeting.lost:
        return Verdict.CRASHED, Cause(None, "node", meeting.lost[min(meeting.lost)]), LIKELY_LOST
    own_errors = any(
        rank.state == "crashed"
        or (rank.state == "failed" and rank.error is not None and not rank.error.is_victim)
        for rank in ranks
    )
    for node, report in sorted(meeting.reports.items()):
        for agent in report["failed_agents"]:
            if agent["signal"] and not own_errors:
                text = f"torchrun of {meeting.name(node)} was killed by {agent['signal']}"
                return Verdict.CRASHED, Cause(None, "signal", text), ""
            if own is Verdict.PASSED:
                last = (report["agent_output"].strip().splitlines() or ["no output"])[-1]
                text = f"torchrun of {meeting.name(node)} left with exit code {agent['exit_code']}: {last}"
                return Verdict.CRASHED, Cause(None, "torchrun", text), ""
    return None


def _missing(meeting: Meeting, ranks: list[RankResult], own: Verdict) -> tuple[Verdict, Cause, str] | None:
    """Green only if every rank of every node has told of its success."""
    expected = set(range(meeting.world_size))
    lacking = expected - {rank.rank for rank in ranks if rank.state in ("passed", "skipped")}
    if own is not Verdict.PASSED or not lacking:
        return None
    return Verdict.FAILED, Cause(None, "missing", f"{rank_list(lacking)} never told of success"), ""


def _with_node(cause: Cause | None, ranks: list[RankResult]) -> Cause | None:
    """The cause, with the machine of its rank."""
    if cause is None or cause.rank is None:
        return cause
    rank = next((rank for rank in ranks if rank.rank == cause.rank), None)
    if rank is None or rank.host is None:
        return cause
    return Cause(
        cause.rank,
        cause.kind,
        f"{cause.message} [rank {rank.rank}: node {rank.node}, {rank.host}]",
        cause.location,
    )


def _taken_over(meeting: Meeting) -> tuple[Verdict, Cause | None, str]:
    """What node 0 says; without a word of it nothing is green."""
    word = meeting.await_verdict() if 0 not in meeting.lost else None
    if word is None:
        text = f"{meeting.lost[0]}; node {meeting.number} ended its own ranks and knows nothing of the others"
        return Verdict.CRASHED, Cause(None, "node", text), LIKELY_LOST
    cause = Cause(*word["cause"]) if word["cause"] else None
    return Verdict(word["verdict"]), cause, word["advice"]
