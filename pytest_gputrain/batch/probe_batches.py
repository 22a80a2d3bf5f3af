"""The batches of a probe: as long as the case's batches get."""

from __future__ import annotations

from typing import Any

import torch

from pytest_gputrain.batch.probe_findings import Observed
from pytest_gputrain.case import TrainingCase, pytree

# Drawn to find the longest where lengths vary: of lengths spread evenly, the longest of 32 is on average 3 %
# below the longest there is.
DRAWS = 32


class Draw:
    """``draw(batch_size)``: a batch of the case. Once shapes vary from call to call, the largest of many."""

    def __init__(self, case: TrainingCase, device: torch.device, observed: Observed) -> None:
        self._case, self._device, self._observed = case, device, observed
        self._shapes: dict[int, list[tuple[int, ...]]] = {}

    def __call__(self, batch_size: int) -> Any:
        batch = self._case.batch(batch_size, self._device)
        if (
            self._shapes.setdefault(batch_size, shapes_of(batch)) == shapes_of(batch)
            and not self._observed.varying
        ):
            return batch
        return self._largest(batch, batch_size)

    def _largest(self, batch: Any, batch_size: int) -> Any:
        smallest = largest = num_values(batch)
        for _ in range(DRAWS - 1):
            another = self._case.batch(batch_size, self._device)
            size = num_values(another)
            smallest = min(smallest, size)
            if size > largest:
                largest, batch = size, another
        self._observed.varying = self._observed.varying or (smallest, largest)
        return batch


def shapes_of(batch: Any) -> list[tuple[int, ...]]:
    """Of every tensor, in a stable order."""
    return [tuple(tensor.shape) for tensor in pytree.tensors(batch)]


def num_values(batch: Any) -> int:
    """Of all tensors together."""
    return sum(tensor.numel() for tensor in pytree.tensors(batch))
