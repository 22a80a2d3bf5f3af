"""Real training under memory budgets: is the size found the exact maximum, and what does finding it cost?

python -m benchmarks.batch_discovery

A GPT trains on the CPU under 1, 2 and 4 GB (accounted, the margin 1), an OPT of transformers under 1 GB.
Beside our search the classic doubling and bisecting, by the same probes. Then a loop of its own tries the
sizes around each answer, and under the smallest budget every size up to it and some beyond, whether they
train.

Claim: every answer is the last size that trains; our search takes less time in all than the classic one.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

import torch

from benchmarks._harness import options, write
from pytest_gputrain import OutOfMemory, TrainingCase, find_batch
from pytest_gputrain.memory.guard import OomGuard
from pytest_gputrain.reference.gpt import gpt_case
from pytest_gputrain.reference.opt import case as opt_case
from pytest_gputrain.values import parse_size

BUDGETS = ("1GB", "2GB", "4GB")
STRATEGIES = ("model", "exponential")
ROWS = 256  # of 32 tokens, which count as one sample: the tiny OPT needs little for one row
BEYOND = 3  # sizes above the answer that are tried too: no gap may hide a larger one


def cases() -> list[TrainingCase]:
    """Many bytes a sample and little arithmetic, so that probes of gigabytes take seconds."""
    gpt = gpt_case(4, width=64, sequence_length=512, vocab_size=8192, name="gpt-d4")

    def rows(batch_size: int, device: torch.device | str) -> dict[str, torch.Tensor]:
        batch: dict[str, torch.Tensor] = opt_case.batch(ROWS * batch_size, device)
        return batch

    opt = TrainingCase(name="opt-tiny", model=opt_case.model, batch=rows, loss=opt_case.loss)
    return [gpt, opt]


def trains(case: TrainingCase, batch_size: int, limit: int) -> bool:
    """Three steps and an evaluation under the limit, by a loop written once more."""
    model = case.model()
    optimizer = case.optimizer(model)
    try:
        with OomGuard(limit, roots=[model]):
            for _ in range(3):
                case.step(model, optimizer, [case.batch(batch_size, "cpu")])
            with torch.no_grad():
                case.loss(model.eval(), case.batch(batch_size, "cpu"))
    except OutOfMemory:
        return False
    return True


def measure(case: TrainingCase, budget: str, *, every_size: bool) -> dict[str, object]:
    """Find by both strategies, and try the sizes around the answer."""
    row: dict[str, object] = {}
    for strategy in STRATEGIES:
        found = find_batch(case, capacity=budget, safety_margin=1, strategy=strategy)
        ooms = sum(peak is None for _, peak in found.search.probes)
        row[strategy] = {
            "size": found.size,
            "seconds": round(found.seconds, 2),
            "probes": len(found.search.probes),
            "ooms": ooms,
        }
        answer = found.size
    tried = range(1 if every_size else answer, answer + BEYOND + 1)
    fit = [size for size in tried if trains(case, size, parse_size(budget))]
    row["tried"] = [tried[0], tried[-1]]
    row["exact"] = fit == list(range(tried[0], answer + 1)) and all(
        row[strategy]["size"] == answer  # type: ignore[index]
        for strategy in STRATEGIES
    )
    return row


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and report. Returns 0 when the claim holds; a quick run proves nothing."""
    given = options(__doc__, argv)
    budgets = ("200MB",) if given.quick else BUDGETS
    measured: dict[str, object] = {}
    seconds = dict.fromkeys(STRATEGIES, 0.0)
    exact = []
    gpt, opt = cases()
    # The second model under the smallest budget alone: all of it takes minutes.
    for case, under in [(gpt, budgets), *([] if given.quick else [(opt, budgets[:1])])]:
        for budget in under:
            row = measure(case, budget, every_size=budget == budgets[0])
            measured[f"{case.name}, {budget}"] = row
            print(f"{case.name}, {budget}: {row}", flush=True)
            exact.append(row["exact"])
            for strategy in STRATEGIES:
                seconds[strategy] += row[strategy]["seconds"]  # type: ignore[index]
    figures: dict[str, float | str] = {
        "exact answers": f"{sum(map(bool, exact))} of {len(exact)}",
        "seconds, model": round(seconds["model"], 1),
        "seconds, exponential": round(seconds["exponential"], 1),
    }
    write("batch_discovery", figures, measured, given.results)
    holds = all(exact) and seconds["model"] <= seconds["exponential"]
    return 0 if holds or given.quick else 1


if __name__ == "__main__":
    sys.exit(main())
