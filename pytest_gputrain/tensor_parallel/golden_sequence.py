"""Sequence parallel by hand: ranks hold parts of the sequence, so its length has to divide by them.

Of another length such layers are told nothing by torch: ranks send parts of different sizes, and gloo aborts.
So lengths that do not divide are left out where a part of the sequence is seen at one that does.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

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


def sequence_is_cut(pair: Pair, batches: list[Any]) -> bool:
    """Whether inputs whose length does not divide are to be left out, which is noted; collective."""
    left_out = [shape_of(batch) for batch in batches if leaves_over(pair, batch)]
    whole = [batch for batch in [*batches, pair.reference_batch()] if not leaves_over(pair, batch)]
    if not whole or not left_out or len(shape_of(whole[0])) != 2:
        return False
    rows, length = shape_of(whole[0])
    look = _Look(rows, length // pair.world.size)
    with look:
        pair.ask_parallel(whole[0])
    cut = any(pair.world.merged(dict.fromkeys(pair.world.held, look.seen)))
    if cut:
        pair.notes.append(
            f"the sequence is cut over the ranks: inputs of {', '.join(map(str, left_out))}, whose length "
            f"does not divide by {pair.world.size}, were left out"
        )
    return cut
