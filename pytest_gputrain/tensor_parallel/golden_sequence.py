"""Sequence parallel by hand: ranks hold parts of the sequence, so its length has to divide by them.

Of another length such layers are told nothing by torch: ranks send parts of different sizes, and gloo aborts.
So where a part of the sequence is seen at a length that divides, those that do not are left out, unless all
ranks get through them in step: a model may pad them itself.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from pytest_gputrain.tensor_parallel.golden_in_step import in_step
from pytest_gputrain.tensor_parallel.golden_inputs import shape_of
from pytest_gputrain.tensor_parallel.golden_pair import Pair
from pytest_gputrain.tensor_parallel.golden_world import is_dtensor


class _Look(TorchFunctionMode):
    """Whether any plain result is (batch, part of the length, channels)."""

    def __init__(self, rows: int, part: int) -> None:
        super().__init__()
        self.begin, self.seen = (rows, part), False

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        output = func(*args, **(kwargs or {}))
        if isinstance(output, torch.Tensor) and not is_dtensor(output) and output.dim() == 3:
            self.seen = self.seen or tuple(output.shape[:2]) == self.begin
        return output


def leaves_over(pair: Pair, batch: Any) -> bool:
    """Whether the batch is of sequences whose length does not divide by the ranks."""
    shape = shape_of(batch)
    return len(shape) > 1 and shape[1] % pair.world.size > 0


def left_out(pair: Pair, batches: list[Any], *, gradients: bool = False) -> list[bool]:
    """By batch, whether its length is not for this model, which is noted; collective.

    gradients: whether backward has to get through as well.
    """
    uneven = [leaves_over(pair, batch) for batch in batches]
    if not any(uneven) or not _sequence_is_cut(pair, batches):
        return [False] * len(batches)
    left = [
        out and not in_step(pair.world, partial(pair.ask_parallel, batch, gradients=gradients))
        for out, batch in zip(uneven, batches, strict=True)
    ]
    if any(left):
        shapes = ", ".join(str(shape_of(batch)) for out, batch in zip(left, batches, strict=True) if out)
        pair.notes.append(
            f"the sequence is cut over the ranks: inputs of {shapes}, whose length does not divide by "
            f"{pair.world.size}, were left out"
        )
    return left


def _sequence_is_cut(pair: Pair, batches: list[Any]) -> bool:
    """Whether any rank computes on a part of the sequence, at a length that divides; collective."""
    whole = [batch for batch in [*batches, pair.reference_batch()] if not leaves_over(pair, batch)]
    if not whole or len(shape_of(whole[0])) != 2:
        return False
    rows, length = shape_of(whole[0])
    look = _Look(rows, length // pair.world.size)
    with look:
        pair.ask_parallel(whole[0])
    return any(pair.world.merged(dict.fromkeys(pair.world.held, look.seen)))
