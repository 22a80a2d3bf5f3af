"""How far the weights of both models have come apart after the same steps.

Adaptive optimizers divide a gradient by its size, which makes as much of rounding as of a gradient: elements
whose golden gradient is rounding are left out.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from pytest_gputrain.tensor_parallel import golden_difference as apart
from pytest_gputrain.tensor_parallel.golden_last_digit import Computed
from pytest_gputrain.tensor_parallel.golden_model import parameters_of
from pytest_gputrain.tensor_parallel.golden_pair import Pair
from pytest_gputrain.tensor_parallel.golden_pieces import parts
from pytest_gputrain.tensor_parallel.records import Difference

Kept = list[tuple[Any, Any]]
"""Tensors of a model, each with its value at the start."""
# Of a gradient's root mean square: elements below it are as much rounding as gradient.
ROUNDING = {"float64": 1e-6, "float32": 1e-3, "float16": 3e-2, "bfloat16": 2e-1}


class Updates(NamedTuple):
    """The worst parameter, its relative error on the worst rank, and where.

    wrong: all that are further off than allowed, in the model's order.
    """

    parameter: str
    relative: float
    difference: Difference | None
    wrong: tuple[str, ...] = ()


def compare_updates(
    pair: Pair, start: Kept, significant: dict[str, torch.Tensor], allowed: float, *, of_updates: bool
) -> Updates:
    """The parallel model's weights against the reference's, whose ``start`` is given. Collective.

    of_updates: relative to the golden update, else to the golden weight.
    """
    before = {id(tensor): kept for tensor, kept in start}
    reference = parameters_of(pair.reference)
    sizes = {}
    for name, parameter in reference.items():
        if name in significant:
            moved = parameter.detach() - before[id(parameter)] if of_updates else parameter.detach()
            sizes[name] = apart.norm(moved * significant[name])
    whole = {name: pair.world.whole(p) for name, p in parameters_of(pair.parallel).items()}
    found = {}
    for rank in pair.world.held:
        got = {name: by_rank[rank] for name, by_rank in whole.items()}
        found[rank] = _on_rank(pair, reference, significant, sizes, got, allowed, rank)
    everywhere = pair.world.merged(found)
    wrong = {name for one in everywhere for name in one.wrong}
    worst = max(everywhere, key=lambda one: one.relative)
    return worst._replace(wrong=tuple(name for name in reference if name in wrong))


def _on_rank(
    pair: Pair,
    reference: dict[str, Any],
    significant: dict[str, torch.Tensor],
    sizes: dict[str, float],
    got: dict[str, Any],
    allowed: float,
    rank: int,
) -> Updates:
    worst, wrong = Updates("", 0.0, None), []
    for name, size in sizes.items():
        one = _distance(pair, name, reference[name].detach(), significant[name], got, rank)
        if one is None or not size:
            continue
        relative = one[0] / size
        if not relative <= worst.relative:  # NaN is worse than any
            worst = Updates(name, relative, one[1])
        if not relative <= allowed:
            wrong.append(name)
    return worst._replace(wrong=tuple(wrong))


def _distance(
    pair: Pair, name: str, golden: torch.Tensor, mask: torch.Tensor, got: dict[str, Any], rank: int
) -> tuple[float, Difference] | None:
    pieces = parts(pair, name, golden, got, rank)
    masks = parts(pair, name, mask, got, rank)
    squares, largest = 0.0, None
    for (wanted, found, *_), (kept, *_) in zip(pieces, masks, strict=True):
        found = torch.where(kept.bool(), found.to(wanted.device), wanted)
        one = apart.difference(wanted, found, rank)
        squares += apart.norm(torch.nan_to_num(found - wanted, nan=torch.inf)) ** 2
        if largest is None or one.largest > largest.largest:
            largest = one
    return None if largest is None else (squares**0.5, largest)


def mark_significant(
    gradients: dict[str, Any], significant: dict[str, torch.Tensor], computed: Computed
) -> None:
    """Where the gradient is not rounding, now and at every step before; exact zeros are exact.

    computed: the type that a gradient of a type is computed in.
    """
    total = sum(apart.norm(grad) ** 2 for grad in gradients.values()) ** 0.5
    for name, grad in gradients.items():
        size = apart.norm(grad)
        rms = size / max(1, grad.numel()) ** 0.5
        counts = (grad.abs() > apart.tolerance(ROUNDING, computed(grad.dtype)) * rms) | (grad == 0)
        if size <= apart.NEGLIGIBLE * torch.finfo(grad.dtype).eps * total:
            counts = torch.zeros_like(counts)
        significant[name] = counts & significant[name] if name in significant else counts
