"""What makes a wrong gradient out of the right one: a part of it, too much of it, or different ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from pytest_gputrain.tensor_parallel import golden_difference as apart
from pytest_gputrain.tensor_parallel.records import GradientRecord

if TYPE_CHECKING:
    from pytest_gputrain.tensor_parallel.golden_pair import Pair
    from pytest_gputrain.tensor_parallel.golden_world import World

EXPLAINED = 1e-2  # what may remain of a difference once it is explained


def reason(pair: Pair, record: GradientRecord, golden: torch.Tensor, own: Mapping[int, Any]) -> str:
    """Why one parameter's gradient is wrong, ``""`` where nothing fits; collective."""
    untied = pair.weights.untied.get(record.name)
    if untied:
        return f"{' and '.join(untied)} are one parameter in the reference and no longer tied"
    single = {
        rank: (pieces[0][0], pieces[0][1]) if len(pieces) == 1 else None for rank, pieces in own.items()
    }
    return explain(single, pair.world, replicated=record.kind == "replicated", what="gradient")


def explain(
    own: Mapping[int, tuple[torch.Tensor, torch.Tensor] | None], world: World, *, replicated: bool, what: str
) -> str:
    """From (wanted, found) of each rank held; collective."""
    scales = world.merged({rank: _scale(*pair) if pair else None for rank, pair in own.items()})
    if all(scale is not None for scale in scales) and _equal([one for one in scales if one is not None]):
        return _scaled(scales[0] or 0.0, world.size, what)
    if not replicated:
        return ""
    founds = world.merged({rank: pair[1].detach().cpu() if pair else None for rank, pair in own.items()})
    wanted = next(iter(own.values()))
    summed = _add_up([one for one in founds if one is not None], wanted[0].cpu()) if wanted else False
    # Summed on one process is summed on all: the parts are the same list everywhere.
    if summed:
        return f"{what} is not summed over the {world.size} ranks"
    if founds[0] is not None and any(not _same(one, founds[0]) for one in founds[1:]):
        return f"{what} differs between ranks"
    return ""


def _scale(wanted: torch.Tensor, found: torch.Tensor) -> float | None:
    """k where found is k times wanted, None where it is no multiple."""
    one, other = wanted.double().flatten(), found.double().flatten().to(wanted.device)
    size = float(one @ one)
    if not size:
        return None
    scale = float(one @ other) / size
    left = float((other - scale * one).norm()) / size**0.5
    return scale if left <= EXPLAINED * max(abs(scale), EXPLAINED) else None


def _equal(scales: Sequence[float]) -> bool:
    return max(scales) - min(scales) <= EXPLAINED * max(1.0, abs(max(scales)))


def _scaled(scale: float, size: int, what: str) -> str:
    if abs(scale) < EXPLAINED:
        return f"{what} is zero"
    if abs(scale - size) < EXPLAINED * size:
        return f"{what} is {size} times the reference's: summed over the {size} ranks once too often"
    if abs(scale * size - 1) < EXPLAINED:
        return f"{what} is 1/{size} of the reference's: divided by the {size} ranks, or not summed over them"
    if abs(scale - 1) < EXPLAINED:
        return ""
    return f"{what} is {scale:.4g} times the reference's on every rank"


def _add_up(founds: Sequence[torch.Tensor], wanted: torch.Tensor) -> bool:
    if any(one.shape != wanted.shape for one in founds):
        return False
    total = torch.stack([one.double() for one in founds]).sum(0)
    return apart.difference(wanted.double(), total).relative <= EXPLAINED


def _same(one: torch.Tensor | None, other: torch.Tensor) -> bool:
    return one is not None and one.shape == other.shape and apart.difference(other, one).relative < EXPLAINED
