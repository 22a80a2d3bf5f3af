"""What makes a wrong gradient out of the right one: a part of it, too much of it, or different ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from pytest_gputrain.tensor_parallel import golden_difference as apart
from pytest_gputrain.tensor_parallel.records_backward import GradientRecord

if TYPE_CHECKING:
    from pytest_gputrain.tensor_parallel.golden_pair import Pair
    from pytest_gputrain.tensor_parallel.golden_world import World

Beside = tuple[torch.Tensor, torch.Tensor]  # what is wanted, and what is found
EXPLAINED = 1e-2  # what may remain of a difference once it is explained


def reason(pair: Pair, record: GradientRecord, golden: torch.Tensor, own: Mapping[int, Any]) -> str:
    """Why one parameter's gradient is wrong, ``""`` where nothing fits; collective."""
    untied = pair.weights.untied.get(record.name)
    if untied:
        return f"{' and '.join(untied)} are one parameter in the reference and no longer tied: tie them again"
    single = {
        rank: (pieces[0][0], pieces[0][1]) if len(pieces) == 1 else None for rank, pieces in own.items()
    }
    whole = record.kind == "replicated"
    return explain(single, pair.world, replicated=whole, what="gradient") or (
        "" if whole else _across(single, pair.world)
    )


def _across(own: Mapping[int, Beside | None], world: World) -> str:
    """Of a parameter that is cut: what other ranks' parts have to do with a wrong gradient; collective."""
    merged = world.merged(
        {r: (pair[0].cpu(), pair[1].detach().cpu()) if pair else None for r, pair in own.items()}
    )
    parts = [part for part in merged if part is not None and part[0].shape == (merged[0] or part)[0].shape]
    if len(parts) < world.size:
        return ""
    total = torch.stack([wanted.double() for wanted, _ in parts]).sum(0)
    times = [scale for _, found in parts if (scale := _scale(total, found)) is not None]
    if len(times) == world.size and _equal(times) and abs(times[0]) > EXPLAINED:
        what = "the sum" if abs(times[0] - 1) < EXPLAINED else f"{times[0]:.3g} times the sum"
        return (
            f"gradient is {what} of all ranks' parts: what is cut over ranks is not to be summed, or "
            "averaged, over them"
        )
    # Ranks that hold the same part, as of key heads that several of them need.
    sharing = [[r for r, (other, _) in enumerate(parts) if torch.equal(other, wanted)] for wanted, _ in parts]
    if all(
        len(ranks) > 1 and _add_up([parts[r][1] for r in ranks], wanted)
        for ranks, (wanted, _) in zip(sharing, parts, strict=True)
    ):
        ranks = " and ".join(map(str, sharing[0]))
        return f"gradient is not summed over the ranks that hold the same part, such as {ranks}"
    return ""


def explain(own: Mapping[int, Beside | None], world: World, *, replicated: bool, what: str) -> str:
    """From (wanted, found) of each rank held; collective."""
    shorter = world.merged({rank: _shorter(*pair) if pair else None for rank, pair in own.items()})
    if shorter[0] and all(kind == shorter[0] for kind in shorter):
        return f"{what} is {shorter[0]} in all its values: a sum over ranks, or a cast, in that type"
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


def _shorter(wanted: torch.Tensor, found: torch.Tensor) -> str | None:
    """The shorter type whose values are all that was found, where the wanted ones are not."""
    if found.dtype not in (torch.float32, torch.float64) or not bool(found.any()):
        return None
    for kind in (torch.bfloat16, torch.float16):
        if torch.equal(found.to(kind).to(found.dtype), found):
            short = torch.equal(wanted.to(kind).to(wanted.dtype), wanted)
            return None if short else apart.kind_of(kind)
    return None


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
