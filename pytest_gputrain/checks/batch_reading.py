"""A batch as the digests of its leaves and of its samples, small enough to travel to a verdict."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

from pytest_gputrain.case import pytree
from pytest_gputrain.trace.digest import value_digest

# A batch of flattened tokens has a row a token: the first ones are enough to know it again.
MAX_ROWS = 256


@dataclass(frozen=True)
class Leaf:
    """rows: digest by sample, where dimension 0 is the batch's; else None. elements: of all samples."""

    digest: str
    shape: tuple[int, ...] | None
    elements: int
    rows: tuple[str, ...] | None


Reading = dict[str, Leaf]


def read(batch: Any) -> Reading:
    """By path, every leaf of the batch."""
    found = list(pytree.leaves(batch))
    sizes = Counter(shape[0] for _, leaf in found if (shape := _shape(leaf)))
    length = sizes.most_common(1)[0][0] if sizes else None
    return {path: _read_leaf(leaf, length) for path, leaf in found}


def _read_leaf(leaf: Any, length: int | None) -> Leaf:
    shape = _shape(leaf)
    if shape is None:
        return Leaf(value_digest(leaf), None, 1, None)
    elements = 1
    for size in shape:
        elements *= size
    has_rows = bool(shape) and shape[0] == length
    rows = tuple(value_digest(_unpadded(row)) for row in _plain(leaf)[:MAX_ROWS]) if has_rows else None
    return Leaf(value_digest(leaf), shape, elements, rows)


def _shape(leaf: Any) -> tuple[int, ...] | None:
    """Of a tensor or an array; None for anything else."""
    return tuple(map(int, leaf.shape)) if hasattr(leaf, "shape") else None


def _plain(leaf: Any) -> Any:
    from pytest_gputrain.trace.digest import whole

    return whole(leaf).cpu() if pytree.is_tensor(leaf) else leaf


def _unpadded(row: Any) -> Any:
    """A row of integers with a run of one value at either end cut to one: a sample is padded to its batch."""
    if not pytree.is_tensor(row) or row.dim() != 1 or row.dtype.is_floating_point or len(row) < 3:
        return row
    changes = (row[1:] != row[:-1]).nonzero().flatten()
    return row[int(changes[0]) : int(changes[-1]) + 2] if len(changes) else row[:1]
