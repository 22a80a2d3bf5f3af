"""A finished launch as a report tells it. Imports no torch.

Of a launch that passed only its ranks' outcomes are kept: ten thousand of them are a night. Of one that did
not, the stacks and last lines of so many ranks as people read; all of it is among the artifacts.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pytest_gputrain.diagnose import readings, timeline
from pytest_gputrain.launch.output import last_lines
from pytest_gputrain.launch.records import RankResult, Verdict
from pytest_gputrain.launch.result import fate
from pytest_gputrain.report.model import Cause, Launch, Rank

if TYPE_CHECKING:
    from pytest_gputrain.launch.result import LaunchResult

MOST_WITH_TEXT = 16  # ranks with a stack and a log; a report of 1,024 ranks has to open on a phone
MOST_EVENTS = 600  # of a timeline, over all ranks
_STACK_LINES, _LOG_LINES = 40, 20
_MOST_TEXT = 6_000  # characters of one stack or log


def launch_of(result: LaunchResult, folder: Path | None) -> Launch:
    """The launch; ``folder``: the report's, which keeps the artifacts. None keeps nothing."""
    good = result.verdict in (Verdict.PASSED, Verdict.SKIPPED)
    cause = result.cause
    return Launch(
        verdict=result.verdict.value,
        seconds=round(result.seconds, 3),
        cause=None if cause is None else Cause(cause.rank, cause.kind, cause.message, cause.location),
        likely=result.likely or None,
        ranks=_ranks(result, with_text=not good),
        artifacts=None if good or folder is None else _artifacts(result, folder),
        timeline=None if good else _timeline(result),
    )


def _ranks(result: LaunchResult, *, with_text: bool) -> tuple[Rank, ...]:
    culprit = result.cause.rank if result.cause else None
    told: set[int] = set()
    if with_text:
        order = sorted(result.ranks, key=lambda rank: (rank.rank != culprit, rank.rank))
        told = {rank.rank for rank in order[:MOST_WITH_TEXT]}
    return tuple(_rank(rank, rank.rank in told, with_text, result.seconds) for rank in result.ranks)


def _rank(rank: RankResult, with_text: bool, with_fate: bool, launch: float) -> Rank:
    stack = (rank.error.traceback if rank.error else "") or rank.stacks
    return Rank(
        rank=rank.rank,
        outcome=rank.state,
        # One that was ended ran as long as the launch.
        seconds=round(launch if rank.state == "ended" else rank.seconds, 3),
        peak_bytes=rank.peak_bytes,
        host=rank.host,
        last=_cut(fate(rank)) if with_fate else None,
        stack=_cut(last_lines(stack, _STACK_LINES)) if with_text else None,
        log_tail=_cut(last_lines(rank.output, _LOG_LINES)) if with_text else None,
    )


def _cut(text: str) -> str | None:
    text = text.strip("\n")
    return (text if len(text) <= _MOST_TEXT else f"[…] {text[-_MOST_TEXT:]}") or None


def _artifacts(result: LaunchResult, folder: Path) -> str | None:
    """Where its files are, from the report's folder; None where they go with the result."""
    if result.folder.temporary:
        return None
    path = os.path.relpath(result.artifacts, folder)
    return None if path.startswith(os.pardir) else Path(path).as_posix()


def _timeline(result: LaunchResult) -> tuple[dict[str, Any], ...] | None:
    """The last collectives of each rank, as Chrome trace events; all of them beside the other artifacts."""
    if not result.folder.made:
        return None
    records = readings.collectives(result.artifacts)
    found = timeline.bars(records, time.time())
    if not found:
        return None
    if not result.folder.temporary:
        with suppress(OSError):  # a full disk takes no verdict away
            text = json.dumps(timeline.chrome_trace(found))
            (result.artifacts / "timeline.json").write_text(text, encoding="utf-8")
    return tuple(timeline.chrome_trace(_latest(found))["traceEvents"])


def _latest(found: Sequence[timeline.Bar]) -> list[timeline.Bar]:
    ranks = {bar.rank for bar in found}
    most = max(1, MOST_EVENTS // len(ranks))
    return [bar for rank in sorted(ranks) for bar in [one for one in found if one.rank == rank][-most:]]
