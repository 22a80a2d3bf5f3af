"""How long a certain deadlock goes unreported: from the moment it is certain to a verdict.

    python -m benchmarks.certain_deadlock

Eight programs of two ranks over gloo write down when they came to where they hang. Beside ``launch``:
torchrun, the ranks' group with a timeout of 20 s; torchrun as it comes (30 minutes), given up after 30 s, so
that its figure is a lower bound; PyTorch's ``MultiProcessTestCase`` with a time limit of 20 s. Its own limit
of 300 s is not waited for. The rivals wait for a clock, so they run on the programs of ``RIVALS_ON`` only.

Claim: under 2 s. About 4 minutes.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks import _deadlocks
from benchmarks._harness import ROOT, options, report, run_command, scratch
from pytest_gputrain.launch import Launcher, LaunchResult, Verdict, shutdown

ROUNDS, CLAIM, LIMIT, GIVEN_UP = 3, 2.0, 20.0, 30.0
OURS = "launch"
RIVALS_ON = ("barrier_on_rank_0", "other_order")
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2"]


def ours(name: str, folder: Path) -> float:
    """Seconds from certain to the result in hand, with everything ended."""
    result: LaunchResult = Launcher()(_deadlocks.run, name, str(folder), timeout=60, check=False)
    seconds = time.time() - _deadlocks.certain_since(folder)
    assert result.verdict is Verdict.HUNG, result.summary()
    return seconds


def torchrun(name: str, folder: Path, timeout: float) -> float:
    """The same under torchrun, with that timeout for the group; GIVEN_UP and more where it is longer."""
    script = ROOT / "benchmarks" / "_deadlocks.py"
    command = [*TORCHRUN, str(script), name, str(folder), str(timeout)]
    try:
        run_command(command, timeout=GIVEN_UP + 10, cwd=folder, expect=1)
    except RuntimeError as error:
        if "was not done" not in str(error):
            raise
    return time.time() - _deadlocks.certain_since(folder)


def multi_process_case(name: str, folder: Path) -> float:
    """The same as a ``MultiProcessTestCase`` with a limit of LIMIT seconds."""
    command = [sys.executable, "-m", "benchmarks._hanging_case", name, str(folder)]
    env: dict[str, str | None] = {"DISTRIBUTED_TESTS_DEFAULT_TIMEOUT": str(int(LIMIT))}
    run_command(command, timeout=LIMIT + 60, cwd=ROOT, env=env, expect=1)
    return time.time() - _deadlocks.certain_since(folder)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and report. Returns 0 when the claim holds for all; a quick run has two programs, no rival."""
    given = options(__doc__, argv)
    seconds: dict[str, list[float]] = {}
    with scratch() as scratch_folder:

        def fresh() -> Path:
            return Path(tempfile.mkdtemp(dir=scratch_folder))

        Launcher()(time.sleep, 0)  # the server is running
        for name in list(_deadlocks.PROGRAMS)[: 2 if given.quick else None]:
            runs = [ours(name, fresh()) for _ in range(1 if given.quick else ROUNDS)]
            seconds[f"{OURS}: {name}"] = runs
        shutdown()
        for name in () if given.quick else RIVALS_ON:
            seconds[f"torchrun, group timeout 20 s: {name}"] = [torchrun(name, fresh(), LIMIT)]
            seconds[f"MultiProcessTestCase, limit 20 s: {name}"] = [multi_process_case(name, fresh())]
        if not given.quick:
            seconds["torchrun as it comes, given up"] = [torchrun(RIVALS_ON[0], fresh(), 1800)]
    mine = [run for way, runs in seconds.items() if way.startswith(OURS) for run in runs]
    figures: dict[str, float | int | str] = {
        "median seconds": statistics.median(mine),
        "longest seconds": max(mine),
        "claim": CLAIM,
    }
    report("certain_deadlock", seconds, figures, results=given.results)
    return 0 if max(mine) < CLAIM or given.quick else 1


if __name__ == "__main__":
    sys.exit(main())
