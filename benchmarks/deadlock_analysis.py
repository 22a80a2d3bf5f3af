"""How long the analysis takes: 64 ranks, each with records of 2,000 collectives, one of which is missing.

    python -m benchmarks.deadlock_analysis

From the records as ranks send them (JSON text, parsed before the clock starts) to the stuck ranks and the
cause. Nothing is compared: nobody else does this while the ranks still wait.

Claim: under 1 s.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Sequence
from typing import Any

from benchmarks._harness import options, report
from pytest_gputrain.launch import blame, deadlock
from pytest_gputrain.launch.deadlock import Scene

RANKS, COLLECTIVES, ROUNDS, CLAIM = 64, 2000, 9, 1.0
CULPRIT = 17
WAY = "64 ranks x 2000 collectives"


def records(rank: int) -> list[dict[str, Any]]:
    """A rank's records; the culprit lacks the last one, in which the others wait."""
    entered = COLLECTIVES - (rank == CULPRIT)
    return [
        {
            "seq": seq,
            "op": "all_reduce",
            "sizes": [[1 + seq % 7]],
            "dtypes": ["float32"],
            "group": "0",
            "ranks": list(range(RANKS)),
            "state": "waiting" if seq == COLLECTIVES else "done",
            "location": f"train.py:{seq % 50} in step",
            "at": 0.0,
            "note": None,
        }
        for seq in range(1, entered + 1)
    ]


def analyse(found: Sequence[list[dict[str, Any]]]) -> None:
    """What a launch does with the answers of its ranks."""
    scenes = {}
    for rank, mine in enumerate(found):
        calls = deadlock.from_json(mine)
        state: Any = "returned" if rank == CULPRIT else "running"
        blocked = rank != CULPRIT
        scenes[rank] = Scene(rank, state, blocked, calls[-1].location, calls=calls)
    assert len(deadlock.stuck(scenes)) == RANKS - 1
    finding = blame.explain(scenes)
    assert finding is not None and finding.cause.rank == CULPRIT


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and report. Returns 0 when the claim holds; a quick run may be slow."""
    given = options(__doc__, argv)
    found = [records(rank) for rank in range(RANKS)]
    runs = []
    for _ in range(1 if given.quick else ROUNDS):
        start = time.perf_counter()
        analyse(found)
        runs.append(time.perf_counter() - start)
    median = statistics.median(runs)
    report(
        "deadlock_analysis", {WAY: runs}, {"median seconds": median, "claim": CLAIM}, results=given.results
    )
    return 0 if median < CLAIM or given.quick else 1


if __name__ == "__main__":
    sys.exit(main())
