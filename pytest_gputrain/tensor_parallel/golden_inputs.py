"""Batches of several shapes from a case that knows one: other batch sizes, for tokens other lengths."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch

from pytest_gputrain.case import TrainingCase, pytree
from pytest_gputrain.tensor_parallel.golden_model import seed_everything

# (batch, length): odd ones, one below any power of two, and a batch of one.
SHAPES = ((1, 5), (2, 10), (4, 15), (1, 20))
OTHER_SIZES = (1, 2, 4)


def token_length(batch: Any) -> int | None:
    """The length that all (batch, length) integer tensors of the batch share; None for other batches."""
    lengths = {int(t.shape[1]) for t in pytree.tensors(batch) if t.dim() == 2 and _is_integer(t)}
    return lengths.pop() if len(lengths) == 1 else None


def _is_integer(tensor: torch.Tensor) -> bool:
    return not tensor.is_floating_point() and not tensor.is_complex() and tensor.dtype != torch.bool


def cut(batch: Any, length: int) -> Any:
    """Every dimension after the first that is as long as the tokens cut to ``length``, masks included."""
    full = token_length(batch)
    if full is None or length >= full:
        return batch

    def shorter(tensor: torch.Tensor) -> torch.Tensor:
        follows = tensor.dim() == 2 or (tensor.dim() > 2 and not _is_integer(tensor))
        for dim in range(1, tensor.dim()):
            if follows and tensor.shape[dim] == full:
                tensor = tensor.narrow(dim, 0, length)
        return tensor.contiguous()

    return pytree.map_tensors(shorter, batch)


def draw(case: TrainingCase, rows: int, device: torch.device, seed: int, length: int | None = None) -> Any:
    """The case's batch of that many rows, the same for the same numbers; cut where a length is given."""
    seed_everything(seed + rows)
    batch = case.batch(rows, device)
    return batch if length is None else cut(batch, length)


def inputs(
    case: TrainingCase, shapes: Sequence[tuple[int, int]], device: torch.device, seed: int
) -> Iterator[tuple[Any, bool]]:
    """Batches, and whether each was cut. For a case without tokens the batch sizes of ``OTHER_SIZES``."""
    if token_length(draw(case, 2, device, seed)) is None:
        for rows in OTHER_SIZES:
            yield draw(case, rows, device, seed), rows == 1
        return
    seen = set()
    for rows, length in shapes:
        batch = draw(case, rows, device, seed, length)
        shape = shape_of(batch)
        if shape not in seen:
            seen.add(shape)
            yield batch, True


def shape_of(batch: Any) -> tuple[int, ...]:
    """Of the batch's first tensor."""
    tensors = pytree.tensors(batch)
    return tuple(tensors[0].shape) if tensors else ()
