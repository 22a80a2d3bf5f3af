"""Whether a stability run tells a leak from a healthy program: planted leaks, healthy seeds, a long run.

    python -m benchmarks.stability_leaks

Leaks: a tensor of 4 KB kept in each step by one rank of two, 200 steps; after how many of them the records
say that memory grows, and go on to say so. Healthy: the tiny planted program and the depth-1 GPT, 1,000
steps, another seed each time, which no finding may come of. Last, 1,000 steps of the depth-4 GPT on 2 ranks.

Claims: leaks found within 200 steps; none of 20 healthy runs called anything; the long run under 3 minutes.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks._harness import options, scratch, write
from pytest_gputrain.case import TrainingCase
from pytest_gputrain.checks.result import CheckResult

LEAK_SEEDS, HEALTHY_SEEDS, GPT_SEEDS = 5, 16, 4
LEAK_STEPS, STEPS, RANKS = 200, 1000, 2
KEPT = 1024  # float32
LEAST, STRIDE = 30, 10  # steps that records are judged after
LIMIT = 180.0


class Keeps:
    """The default step, and a tensor of 4 KB kept by rank 1."""

    def __init__(self) -> None:
        self.kept: list[Any] = []

    def __call__(self, model: Any, optimizer: Any, micro_batches: Any) -> Any:
        import torch
        from torch import distributed

        from pytest_gputrain.case.defaults import DefaultStep
        from tests.planted.plant import loss

        if distributed.get_rank() == 1:
            self.kept.append(torch.zeros(KEPT))
        return DefaultStep(loss)(model, optimizer, micro_batches)


def leaking() -> TrainingCase:
    from tests.planted.plant import case

    return case("keeps-4-kb", step=Keeps())


def healthy() -> TrainingCase:
    from tests.planted.plant import case

    return case("healthy")


def gpt(depth: int) -> TrainingCase:
    from pytest_gputrain.reference.gpt import gpt_case

    return gpt_case(depth, name=f"gpt-d{depth}")


def run(case: TrainingCase, steps: int, seed: int, folder: Path) -> CheckResult:
    """The check on 2 ranks, with another seed."""
    from pytest_gputrain.checks.context import CheckContext
    from pytest_gputrain.checks.stable_training import check_stable_training
    from pytest_gputrain.endurance.plan import StabilityOptions

    kept = StabilityOptions(folder=str(folder), save_every=10**9)
    ctx = CheckContext(world_size=RANKS, seed=seed, iterations=steps, stability=kept)
    result = check_stable_training(case, ctx)
    if result.outcome != "passed":
        print(f"{case.name}, seed {seed}: {result.message}")
    return result


def found_after(seed: int) -> int | None:
    """The steps after which a leak is told, at that step and all later ones; None where it is not."""
    from pytest_gputrain.endurance.judge import grows
    from pytest_gputrain.endurance.records import read_records

    with scratch() as folder:
        figures = run(leaking(), LEAK_STEPS, seed, folder).figures
        if (figures.get("kind"), figures.get("rank")) != ("memory", 1):
            return None
        (path,) = folder.rglob("steps-rank1.jsonl")
        records = read_records(path).records
    first = None
    for steps in range(LEAK_STEPS, LEAST - 1, -STRIDE):
        if not grows(records[:steps]):
            break
        first = steps
    return first


def called(case: TrainingCase, steps: int, seed: int) -> bool:
    """Whether anything is said to be wrong with a healthy program."""
    with scratch() as folder:
        return run(case, steps, seed, folder).outcome != "passed"


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and report. Returns 0 when the claims hold; a quick run only has to get to its end."""
    from pytest_gputrain.launch import shutdown

    given = options(__doc__, argv)
    leaks, tiny, large, steps = (
        (1, 1, 0, 60) if given.quick else (LEAK_SEEDS, HEALTHY_SEEDS, GPT_SEEDS, STEPS)
    )
    found = [found_after(seed) for seed in range(leaks)]
    wrong = [called(healthy(), steps, seed) for seed in range(tiny)]
    wrong += [called(gpt(1), steps, seed) for seed in range(large)]
    begun = time.perf_counter()
    long = called(gpt(2 if given.quick else 4), steps, 1)
    seconds = time.perf_counter() - begun
    shutdown()
    late = [one for one in found if one is None]
    holds = not late and not any(wrong) and not long and seconds < LIMIT
    figures: dict[str, float | int | str] = {
        "leaks of 4 KB a step": len(found),
        "found within so many steps, at most": max((one for one in found if one is not None), default=0),
        "not found": len(late),
        f"healthy runs of {steps} steps": len(wrong),
        "of these called wrong": sum(wrong),
        f"seconds for {steps} steps of the depth-4 GPT on {RANKS} ranks": round(seconds, 1),
        "claim": f"leaks found within {LEAK_STEPS} steps, no healthy run called, {LIMIT:.0f} s at most",
        "claim_holds": str(holds),
    }
    write("stability_leaks", figures, {"steps until found, by seed": found}, given.results)
    return 0 if holds or given.quick else 1


if __name__ == "__main__":
    sys.exit(main())
