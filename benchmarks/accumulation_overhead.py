"""What accumulation costs: the reference GPT's step in A micro-batches against the full batch at once.

    python -m benchmarks.accumulation_overhead

One process: in each round every A trains one step of the same batch, in turn; its overhead is the median over
rounds of its step time over that round's with A = 1. The literature says 5 to 10 %. On a CPU that holds for
micro-batches that still fill it; on a GPU small ones leave it idle, which this does not measure.

Two ranks (gloo, DDP): the all-reduces of a step, counted by a communication hook, with ``no_sync`` around all
micro-batches but the last and without, and what they take.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

from benchmarks._harness import options, report
from pytest_gputrain.launch import Launcher, shutdown

DEPTH, SEQUENCE_LENGTH, BATCH_SIZE = 4, 64, 32
STEPS = (1, 2, 4, 8, 16)
RANK_BATCH_SIZE, RANK_STEPS = 16, 8
ROUNDS, RANK_ROUNDS = 12, 10
TIMEOUT = 300.0
WITH, WITHOUT = "no_sync", "no no_sync"


def in_one_process(rounds: int) -> dict[str, list[float]]:
    """In a rank: by accumulation steps, the seconds of each round's step."""
    import torch

    from pytest_gputrain.reference.gpt import gpt_case

    case = gpt_case(DEPTH, sequence_length=SEQUENCE_LENGTH)
    model = case.model()
    optimizer = case.optimizer(model)
    batch = case.batch(BATCH_SIZE, torch.device("cpu"))
    found: dict[str, list[float]] = {name_of(steps): [] for steps in STEPS}
    for number in range(-1, rounds):  # the first round warms up
        shift = number % len(STEPS)  # so that none always follows the same one
        for steps in STEPS[shift:] + STEPS[:shift]:
            micro_batches = case.split(batch, steps)
            seconds = seconds_of(lambda parts=micro_batches: case.step(model, optimizer, parts))
            if number >= 0:
                found[name_of(steps)].append(seconds)
    return found


def on_ranks(rounds: int) -> tuple[dict[str, list[float]], dict[str, int]]:
    """In a rank: seconds of each round's step, and all-reduces a step, with and without ``no_sync``."""
    import torch
    from torch.distributed import GradBucket  # type: ignore[attr-defined]
    from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
    from torch.nn.parallel import DistributedDataParallel

    from pytest_gputrain.reference.gpt import gpt_case

    case = gpt_case(DEPTH, sequence_length=SEQUENCE_LENGTH)
    model = DistributedDataParallel(case.model())
    counted = 0

    def counting(state: object, bucket: Any) -> Any:
        nonlocal counted
        counted += 1
        return allreduce_hook(None, bucket)  # type: ignore[arg-type]

    # DDP looks at the annotations, which are texts here.
    counting.__annotations__ = {
        "bucket": GradBucket,
        "return": torch.futures.Future[torch.Tensor],
    }
    model.register_comm_hook(None, counting)
    optimizer = case.optimizer(model)
    micro_batches = case.split(case.batch(RANK_BATCH_SIZE, torch.device("cpu")), RANK_STEPS)

    def step(synchronised: bool) -> None:
        optimizer.zero_grad()
        for number, micro_batch in enumerate(micro_batches, 1):
            free = number == len(micro_batches) or synchronised
            with nullcontext() if free else model.no_sync():
                (case.loss(model, micro_batch) / len(micro_batches)).backward()
        optimizer.step()

    found: dict[str, list[float]] = {WITH: [], WITHOUT: []}
    reductions = {WITH: 0, WITHOUT: 0}
    for number in range(-2, rounds):  # DDP builds its buckets anew after the first step
        for name in (WITH, WITHOUT) if number % 2 else (WITHOUT, WITH):
            counted = 0
            seconds = seconds_of(lambda name=name: step(name == WITHOUT))
            reductions[name] = counted
            if number >= 0:
                found[name].append(seconds)
    return found, reductions


def seconds_of(step: Any) -> float:
    import time

    start = time.perf_counter()
    step()
    return time.perf_counter() - start


def name_of(steps: int) -> str:
    return f"{steps} x {BATCH_SIZE // steps}"


def overhead(seconds: dict[str, list[float]], name: str, than: str) -> float:
    """Per cent of step time, by the median over rounds."""
    ratios = [mine / other for mine, other in zip(seconds[name], seconds[than], strict=True)]
    return round(100 * (statistics.median(ratios) - 1), 1)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and report."""
    given = options(__doc__, argv)
    rounds, rank_rounds = (1, 1) if given.quick else (ROUNDS, RANK_ROUNDS)
    launch = Launcher()
    # One thread a rank, on one process too: threads that wait for each other measure the machine.
    env = {"OMP_NUM_THREADS": "1"}
    alone = launch(in_one_process, rounds, world_size=1, timeout=TIMEOUT, env=env).values[0]
    together, reductions = launch(on_ranks, rank_rounds, world_size=2, timeout=TIMEOUT, env=env).values[0]
    shutdown()
    figures: dict[str, float | int | str] = {
        "model": f"GPT of depth {DEPTH}, sequences of {SEQUENCE_LENGTH}, batch {BATCH_SIZE}",
        **{
            f"% of step time more for {name_of(steps)}": overhead(alone, name_of(steps), name_of(1))
            for steps in STEPS[1:]
        },
        **{f"all-reduces a step, {RANK_STEPS} micro-batches, {name}": n for name, n in reductions.items()},
        "all-reduces saved by no_sync": reductions[WITHOUT] - reductions[WITH],
        f"% of step time more for {WITHOUT}, 2 ranks": overhead(together, WITHOUT, WITH),
    }
    measured = {**alone, **{f"2 ranks, {name}": runs for name, runs in together.items()}}
    report("accumulation_overhead", measured, figures, ours=name_of(1), results=given.results)
    return 0


if __name__ == "__main__":
    sys.exit(main())
