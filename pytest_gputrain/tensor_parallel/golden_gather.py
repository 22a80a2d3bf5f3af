"""One whole output from what ranks have of it, whoever sharded it."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

import torch

from pytest_gputrain.tensor_parallel.golden_world import Pieces, World, is_dtensor

Shape = tuple[int, ...]


@dataclass
class Assembled:
    """tensors: by rank held, of the wanted shape where that was possible. dim: on which parts were joined."""

    tensors: Pieces
    dim: int | None = None


def assemble(tensor: Any, wanted: Shape, world: World, mesh: Any) -> Assembled:
    """Collective. Parts that are too short on one dimension are joined in the order of ranks.

    A dimension that comes out too long by less than a part was padded, and is cut.
    """
    pieces = world.whole(tensor)
    shapes = world.merged({rank: tuple(piece.shape) for rank, piece in pieces.items()})
    if is_dtensor(tensor) or all(shape == wanted for shape in shapes):
        sharded = next((p.dim for p in getattr(tensor, "placements", ()) if p.is_shard()), None)
        return Assembled({rank: _cut(piece, wanted) for rank, piece in pieces.items()}, sharded)
    dim = _joined_dim(shapes, wanted)
    if dim is None:
        return Assembled(pieces)
    parts = world.merged({rank: piece.cpu() for rank, piece in pieces.items()})
    joined = {}
    for rank, piece in pieces.items():
        group = next((g for g in groups(mesh, rank) if _fits(shapes, g, wanted, dim)), None)
        if group is not None:
            piece = torch.cat([parts[other] for other in group], dim).to(piece.device)
        joined[rank] = _cut(piece, wanted)
    return Assembled(joined, dim)


def _joined_dim(shapes: list[Shape], wanted: Shape) -> int | None:
    """The one dimension on which some rank has less than is wanted, all others being as wanted."""
    if any(len(shape) != len(wanted) for shape in shapes):
        return None
    dims = {d for shape in shapes for d in range(len(wanted)) if shape[d] != wanted[d]}
    return dims.pop() if len(dims) == 1 else None


def groups(mesh: Any, rank: int) -> list[list[int]]:
    """The ranks along each dimension of the mesh on which this one is, the longest row last."""
    layout = mesh.mesh
    places = (layout == rank).nonzero()
    if not len(places):
        return []
    place = places[0].tolist()
    along = [
        layout[tuple(slice(None) if d == dim else place[d] for d in range(layout.dim()))].tolist()
        for dim in range(layout.dim())
    ]
    return [*along, layout.flatten().tolist()]


def _fits(shapes: list[Shape], group: list[int], wanted: Shape, dim: int) -> bool:
    ends = list(itertools.accumulate(shapes[rank][dim] for rank in group))
    if dim < len(wanted) - 1:  # padding is only known at the end of a vocabulary
        return ends[-1] == wanted[dim]
    return ends[-1] >= wanted[dim] > (ends[-2] if len(ends) > 1 else 0)


def _cut(piece: torch.Tensor, wanted: Shape) -> torch.Tensor:
    """Without padding at the end of the last dimension, a vocabulary's."""
    if piece.dim() == len(wanted) and piece.shape[:-1] == wanted[:-1] and piece.dim():
        over = piece.shape[-1] - wanted[-1]
        if 0 < over <= max(64, wanted[-1] // 8):
            return piece.narrow(-1, 0, wanted[-1])
    return piece
