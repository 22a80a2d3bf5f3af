"""The pieces of one parameter that a rank has, beside the reference's, and how far they are off."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from pytest_gputrain.tensor_parallel import golden_difference as apart
from pytest_gputrain.tensor_parallel.golden_layout import Layout
from pytest_gputrain.tensor_parallel.golden_pair import Pair
from pytest_gputrain.tensor_parallel.golden_weights import Held

# One unit of a large layer that is on in one model and off in the other makes more than the tolerance of
# one row of a gradient.
KINKS = 2


def parts(
    pair: Pair, name: str, golden: torch.Tensor, got: Mapping[str, Any], rank: int
) -> list[tuple[torch.Tensor, torch.Tensor, Layout, int, int]]:
    """(wanted, found, layout, start in the source, start of the found) of each piece that a rank has."""
    pieces = []
    for holder in pair.weights.holders(name):
        held: Held = pair.weights.held[holder][rank]
        if held.layout is None or got.get(holder) is None:
            continue
        grad = got[holder]
        for segment in held.layout.segments:
            if segment.source != name:
                continue
            source = golden.t() if held.layout.transposed else golden
            if not source.dim():
                pieces.append((source, grad, held.layout, 0, 0))
                continue
            at = (held.layout.dim, segment.source_start, segment.length)
            found = grad.narrow(held.layout.dim, segment.start, segment.length)
            pieces.append((source.narrow(*at), found, held.layout, segment.source_start, segment.start))
    return pieces


def square(one: torch.Tensor, other: torch.Tensor) -> float:
    """Of the difference's norm; infinite where it is NaN."""
    wide = torch.float64 if one.dtype == torch.float64 else torch.float32
    delta = other.detach().to(one.device, wide) - one.to(wide)
    value = apart.norm(delta)
    return value * value if value == value else float("inf")


def elsewhere(one: torch.Tensor, other: torch.Tensor) -> float:
    """The square of the difference's norm without the rows, or columns, where it is largest."""
    squares = (other.detach().to(one.device, torch.float32) - one.float()).square()
    least = float("inf")
    for dim in range(min(2, squares.dim())):
        lines = squares.movedim(dim, 0).reshape(squares.shape[dim], -1).sum(1)
        kept = lines.numel() - min(KINKS, lines.numel())
        least = min(least, float(lines.sort().values[:kept].sum()))
    return least if least == least and squares.dim() else float("inf")


def in_source(index: tuple[int, ...], layout: Layout, start: int) -> tuple[int, ...]:
    """The place in the reference's parameter of a place in one piece of it."""
    if not index:
        return index
    moved = [i + (start if dim == layout.dim else 0) for dim, i in enumerate(index)]
    return tuple(reversed(moved)) if layout.transposed else tuple(moved)
