"""From what is known about each rank to a verdict and its cause. Pure: no process, no clock, no torch.

The rules, in this order:

1. every rank reported success in time, and none is missing: PASSED; every rank skipped: SKIPPED;
2. a rank died without a report, or raised something that is not the echo of another rank's death:
   the earliest of these is the cause;
3. ranks raised only such echoes: the cause is whoever left them;
4. nobody failed, but the launch had to be ended: HUNG when nothing moved any more, TIMED_OUT otherwise;
5. some ranks skipped while others ran: FAILED.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

from .records import Cause, RankResult, Verdict

Ending = Literal["complete", "failure", "deadline", "stalled", "deserted", "deadlocked"]
"""Why the launch came to its end: every rank reported, a rank failed, the deadline came, no rank moved
for ``stall`` seconds, ranks wait in a collective for one that has finished, or all ranks wait."""


def judge(
    ranks: Sequence[RankResult],
    ending: Ending,
    *,
    seconds: float,
    found: Cause | None = None,
    waiting_for: Mapping[int, str] | None = None,
) -> tuple[Verdict, Cause | None]:
    """The verdict of a launch, and the first thing that went wrong (None when PASSED).

    ``found`` is what the ranks' collectives say about a hang or a desync; ``waiting_for`` who is held up by a
    rank that is slow.
    """
    if ranks and ending == "complete":
        if all(rank.state == "passed" for rank in ranks):
            return Verdict.PASSED, None
        if all(rank.state == "skipped" for rank in ranks):
            return Verdict.SKIPPED, _skipped(ranks[0])
    return (
        _failed(ranks, found)
        or _echoes(ranks, found)
        or _slow(ranks, ending, seconds, waiting_for or {})
        or _stuck(ranks, found)
        or _mixed(ranks)
    )


def _skipped(rank: RankResult) -> Cause:
    reason = rank.error.message if rank.error else ""
    return Cause(None, "skip", reason or "every rank skipped", rank.error.location if rank.error else None)


def _failed(ranks: Sequence[RankResult], found: Cause | None) -> tuple[Verdict, Cause] | None:
    """The earliest rank that died without a report or raised an error of its own."""
    culprits = [rank for rank in ranks if rank.state == "crashed" or _own_error(rank)]
    if not culprits:
        return None
    first = min(culprits, key=lambda rank: (rank.seconds, rank.rank))
    if first.state == "crashed":
        return Verdict.CRASHED, _crash(first, found)
    if first.error is None:
        return Verdict.FAILED, Cause(first.rank, "exception", f"rank {first.rank} failed and did not say how")
    kind = "exit" if first.error.type == "SystemExit" else "exception"
    message = f"rank {first.rank} raised {first.error.headline}"
    if kind == "exit" and (last := first.stderr.strip().splitlines()[-1:]):
        message += f" ({last[0][:200]})"  # argparse and others say there why they leave
    return Verdict.FAILED, Cause(first.rank, kind, message, first.error.location)


def _own_error(rank: RankResult) -> bool:
    error = rank.error
    return rank.state == "failed" and not (error and (error.is_victim or error.is_wait_timeout))


def _crash(rank: RankResult, found: Cause | None) -> Cause:
    if rank.signal == "SIGABRT" and found is not None and found.kind in ("mismatch", "order"):
        # gloo aborts, in a thread of its own, on whichever side notices: not the one that is wrong.
        culprit = rank.rank if found.rank is None else found.rank
        text = f"rank {rank.rank} was killed by SIGABRT: {found.message}"
        text = text.replace(f": rank {rank.rank} called", ": it called")
        return Cause(culprit, found.kind, text, found.location)
    if rank.signal:
        return Cause(rank.rank, "signal", f"rank {rank.rank} was killed by {rank.signal}", rank.waiting_at)
    if rank.exit_code is None:
        message = f"rank {rank.rank} ended and sent no report"
    elif rank.exit_code == 0:
        message = f"rank {rank.rank} left with exit code 0 before it was done (os._exit?)"
    else:
        message = f"rank {rank.rank} left with exit code {rank.exit_code} and no report (os._exit?)"
    return Cause(rank.rank, "exit", message, rank.waiting_at)


def _echoes(ranks: Sequence[RankResult], found: Cause | None) -> tuple[Verdict, Cause] | None:
    """Ranks failed, but only because another one was not there for them."""
    victims = [rank for rank in ranks if rank.state == "failed"]
    if not victims:
        return None
    first = min(victims, key=lambda rank: (rank.seconds, rank.rank))
    assert first.error is not None
    verdict = Verdict.HUNG if first.error.is_wait_timeout else Verdict.FAILED
    if found is not None:
        return verdict, found
    gone = [rank for rank in ranks if rank.state in ("passed", "skipped")]
    if first.error.is_wait_timeout or len(gone) + len(victims) < len(ranks):
        gone = [rank for rank in gone if rank.seconds <= first.seconds]
    # Otherwise it may have reported later: it destroyed its group, and the connections, before it was done.
    if gone:
        return verdict, _left(
            gone, f"rank {first.rank} needed it ({first.error.headline})", first.error.location
        )
    absent = [rank for rank in ranks if rank.state == "ended" and not rank.in_collective]
    if first.error.is_wait_timeout and absent:
        where = f" at {absent[0].waiting_at}" if absent[0].waiting_at else ""
        message = f"rank {first.rank} waited in vain for rank {absent[0].rank}{where}: {first.error.headline}"
        return verdict, Cause(absent[0].rank, "absent", message, first.error.location)
    message = f"rank {first.rank} raised {first.error.headline}"
    return verdict, Cause(first.rank, "exception", message, first.error.location)


def _left(gone: Sequence[RankResult], others: str, at: str | None) -> Cause:
    left = min(gone, key=lambda rank: (rank.seconds, rank.rank))
    if left.state == "skipped":
        reason = left.error.message if left.error else ""
        did = f"skipped ({reason})" if reason else "skipped"
    else:
        did = "had finished"
    return Cause(left.rank, "left", f"rank {left.rank} {did} while {others}", at)


def _slow(
    ranks: Sequence[RankResult], ending: Ending, seconds: float, waiting_for: Mapping[int, str]
) -> tuple[Verdict, Cause] | None:
    """The deadline came, and something still moved."""
    moving = [rank for rank in ranks if rank.state == "ended" and rank.moving]
    if ending != "deadline" or not moving:
        return None
    # Of several, the one that is not in a collective holds the others up.
    slow = next((rank for rank in moving if not rank.in_collective), moving[0])
    message = f"rank {slow.rank} was still running after {seconds:.1f} s{waiting_for.get(slow.rank, '')}"
    return Verdict.TIMED_OUT, Cause(slow.rank, "slow", message, slow.waiting_at)


def _stuck(ranks: Sequence[RankResult], found: Cause | None) -> tuple[Verdict, Cause] | None:
    running = [rank for rank in ranks if rank.state == "ended"]
    if not running:
        return None
    if found is not None:
        return Verdict.HUNG, found
    waiting = [rank for rank in running if rank.in_collective]
    elsewhere = [rank for rank in running if not rank.in_collective]
    gone = [rank for rank in ranks if rank.state in ("passed", "skipped")]
    if gone and waiting and not elsewhere:
        first = waiting[0]
        return Verdict.HUNG, _left(gone, f"rank {first.rank} waits for it in a collective", first.waiting_at)
    if elsewhere:
        stuck = elsewhere[0]
        others = f"; rank {waiting[0].rank} waits in a collective" if waiting else ""
        message = f"rank {stuck.rank} stopped moving{others}"
        return Verdict.HUNG, Cause(stuck.rank, "stuck", message, stuck.waiting_at)
    message = "every rank waits in a collective, and none can go on"
    return Verdict.HUNG, Cause(None, "deadlock", message, waiting[0].waiting_at)


def _mixed(ranks: Sequence[RankResult]) -> tuple[Verdict, Cause]:
    """Nobody failed, yet not everybody passed: some skipped, or there was no rank at all."""
    skipped = next((rank for rank in ranks if rank.state == "skipped"), None)
    passed = next((rank for rank in ranks if rank.state == "passed"), None)
    if skipped is None or passed is None:
        return Verdict.FAILED, Cause(None, "missing", "no rank reported")
    reason = skipped.error.message if skipped.error else "no reason"
    message = (
        f"rank {skipped.rank} skipped ({reason}) while rank {passed.rank} ran: skip on all ranks or on none"
    )
    return Verdict.FAILED, Cause(
        skipped.rank, "skip", message, skipped.error.location if skipped.error else None
    )
