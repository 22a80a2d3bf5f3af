"""Do gradients add up over two backward passes? What sums over ranks in a hook may sum twice.

A hook that all-reduces ``parameter.grad`` once it has accumulated sums at the second backward what the first
one has summed already: right with one micro-batch, and wrong by the number of ranks with several.
"""

from __future__ import annotations

from typing import Any

import torch

from pytest_gputrain.tensor_parallel import golden_difference as apart
from pytest_gputrain.tensor_parallel.golden_model import parameters_of
from pytest_gputrain.tensor_parallel.golden_outputs import ask
from pytest_gputrain.tensor_parallel.golden_pair import Pair
from pytest_gputrain.tensor_parallel.golden_step import SUMMED_AGAIN

# Beside the sum's rounding, kernels may add in another order each time.
SLACK = 10.0


def note_accumulation(pair: Pair, batch: Any, order: list[str]) -> None:
    """A note on the first parameter, going backward, whose gradient a second backward does not double.

    No failure: with one micro-batch a step all is right, and a step of the case's own is asked for two by
    ``compare_optimizers``, which fails. Nothing is said where the reference's gradients are not doubled
    either (a model that changes as it is asked). Collective.
    """
    if pair.case.has_own_step:
        return
    with pair.world.acting():
        grown = _grown(pair, pair.parallel, batch)
    wrong: dict[int, dict[str, float]] = {rank: {} for rank in pair.world.held}
    for name, (once, twice) in grown.items():
        pieces, later = pair.world.pieces(once), pair.world.pieces(twice)
        for rank, piece in pieces.items():
            if (times := _times(piece, later[rank])) is not None:
                wrong[rank][name] = times
    by_rank = pair.world.merged(wrong)
    names = {name for one in by_rank for name in one}
    if not names or not _reference_doubles(pair, batch):
        return
    first = next((name for name in order if name in names), min(names))
    rank = next(rank for rank, one in enumerate(by_rank) if first in one)
    more = f" ({len(names)} parameters in all)" if len(names) > 1 else ""
    pair.notes.append(
        f"do not accumulate micro-batches: {first}.grad after two backward passes of one batch is "
        f"{by_rank[rank][first]:.3g} times that of one on rank {rank}, not 2 times{more}; {SUMMED_AGAIN}"
    )


def _grown(pair: Pair, model: Any, batch: Any) -> dict[str, tuple[Any, Any]]:
    """By name, gradients of one backward, and of two without zeroing between."""
    model.zero_grad(set_to_none=True)
    ask(pair.case, model, batch, pair.seed, gradients=True)
    once = {n: p.grad.detach().clone() for n, p in parameters_of(model).items() if p.grad is not None}
    ask(pair.case, model, batch, pair.seed, gradients=True)
    twice = {n: p.grad.detach().clone() for n, p in parameters_of(model).items() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return {name: (once[name], twice[name]) for name in once if name in twice}


def _times(once: torch.Tensor, twice: torch.Tensor) -> float | None:
    """How many times the one the other is; None where it is the double."""
    allowed = SLACK * apart.tolerance(apart.GRADIENT_TOLERANCE, once.dtype)
    if once.shape != twice.shape or apart.difference(2 * once, twice).relative <= allowed:
        return None
    one, other = once.double().flatten(), twice.double().flatten()
    return float(one @ other) / float(one @ one) if bool(one.any()) else float("inf")


def _reference_doubles(pair: Pair, batch: Any) -> bool:
    with pair.world.alone():
        grown = _grown(pair, pair.reference, batch)
    same = all(_times(*both) is None for both in grown.values())
    return all(pair.world.merged(dict.fromkeys(pair.world.held, same)))
