"""What the compile monitor costs after warm-up: steps of the compiled depth-4 GPT under it, against without.

    python -m benchmarks.compile_monitor_cost

One process, backend aot_eager. A monitor watches what is compiled within its block, so each side compiles
anew in each round: without, with, and without again, in an order that turns. Warm-up and compiling are left
out; the cost is the median over rounds of a side's median step over that round's without, in processor time,
which other programs disturb least. What "again" costs is noise. A step of this model is short, which is the
hard case: what the monitor does in a step is the same for any.

Claim: under 1 % of step time.
"""

from __future__ import annotations

import contextlib
import statistics
import sys
from collections.abc import Sequence
from typing import Any

from benchmarks._harness import options, report
from pytest_gputrain.launch import Launcher, shutdown

DEPTH, BATCH_SIZE, SEQUENCE_LENGTH = 4, 4, 64
ROUNDS, STEPS, WARM_UP = 7, 40, 5
CLAIM = 1.0  # per cent
TIMEOUT = 1800.0
OFF, ON, AGAIN = "off", "monitor", "off, again"
SIDES = (OFF, ON, AGAIN)


def measure(rounds: int, steps: int) -> dict[str, list[float]]:
    """In a rank: by side, the median step of each round in seconds of processor."""
    found: dict[str, list[float]] = {side: [] for side in SIDES}
    for number in range(-1, rounds):  # the first round warms up
        shift = number % len(SIDES)  # so that no side always follows the same one
        for side in SIDES[shift:] + SIDES[:shift]:
            seconds = train(side == ON, steps)
            if number >= 0:
                found[side].append(statistics.median(seconds))
    return found


def train(monitored: bool, steps: int) -> list[float]:
    """Seconds of processor for each step of a fresh compiled model."""
    import time

    import torch

    from pytest_gputrain.compile.monitor import compile_monitor
    from pytest_gputrain.reference.gpt import gpt_case

    torch._dynamo.reset()
    torch.manual_seed(0)
    case = gpt_case(DEPTH, sequence_length=SEQUENCE_LENGTH)
    model = case.model()
    optimizer = case.optimizer(model)
    batch = case.batch(BATCH_SIZE, torch.device("cpu"))
    watching: Any = compile_monitor() if monitored else contextlib.nullcontext()
    seconds = []
    with watching as monitor:
        compiled = torch.compile(model, backend="aot_eager", dynamic=False)
        for step in range(WARM_UP + steps):
            start = time.process_time()
            if monitor is not None:
                monitor.step(step)
            case.step(compiled, optimizer, [batch])
            seconds.append(time.process_time() - start)
        if monitor is not None:
            assert monitor.is_compiled(), str(monitor)
    return seconds[WARM_UP:]


def cost(seconds: dict[str, list[float]], side: str) -> float:
    """Per cent of step time, by the median over rounds."""
    ratios = [mine / other for mine, other in zip(seconds[side], seconds[OFF], strict=True)]
    return 100 * (statistics.median(ratios) - 1)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and report. Returns 0 when the claim holds; a quick run only has to get to its end."""
    given = options(__doc__, argv)
    rounds, steps = (1, 2) if given.quick else (ROUNDS, STEPS)
    # One thread: threads that wait for each other measure the machine.
    launch = Launcher()(measure, rounds, steps, world_size=1, timeout=TIMEOUT, env={"OMP_NUM_THREADS": "1"})
    shutdown()
    seconds = launch.values[0]
    monitor = cost(seconds, ON)
    figures: dict[str, float | int | str] = {
        "model": f"GPT of depth {DEPTH}, {BATCH_SIZE} x {SEQUENCE_LENGTH} tokens, aot_eager",
        "steps a round": steps,
        "% of step time for the monitor": round(monitor, 2),
        "% of step time for nothing, again": round(cost(seconds, AGAIN), 2),
        "claim": f"the monitor costs under {CLAIM} % of step time",
        "claim_holds": str(monitor < CLAIM),
    }
    report("compile_monitor_cost", seconds, figures, ours=OFF, results=given.results)
    return 0 if monitor < CLAIM or given.quick else 1


if __name__ == "__main__":
    sys.exit(main())
