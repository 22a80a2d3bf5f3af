"""Rows that fill a vocabulary up to a multiple of the ranks: no loss may depend on them.

Their logits are only a little of a softmax, and nothing of it where other logits are large; their gradient is
zero where they are masked or cut off, and only there.
"""

from __future__ import annotations

from typing import Any

import torch

from pytest_gputrain.tensor_parallel import golden_difference as apart
from pytest_gputrain.tensor_parallel.golden_gradients import parallel_gradients
from pytest_gputrain.tensor_parallel.golden_pair import Pair
from pytest_gputrain.tensor_parallel.golden_weights import Held

# Of the whole gradient. Masked by -100 or less, what is left of a softmax is far below.
LEAST = 1e-13


def padding_problem(pair: Pair, total: float) -> str | None:
    """The first padded parameter whose padding has a gradient; collective. total: norm of all gradients."""
    padded = [record for record in pair.weights.records if record.padding and record.held_as]
    if not padded:
        return None
    got = parallel_gradients(pair)
    for record in padded:
        holder = record.held_as[0]
        own = {r: _norm(pair.weights.held[holder][r], got[r].get(holder)) for r in pair.world.held}
        if max(pair.world.merged(own)) > LEAST * total:
            return (
                f"{record.name} is filled up by {record.padding} on dimension {record.dim or 0}, and what "
                "fills it gets a gradient, so it takes part in the loss: mask it (as logits of no token), or "
                "cut it off"
            )
    return None


def _norm(held: Held, gradient: Any) -> float:
    """Of the gradient of what is in no segment."""
    if held.layout is None or gradient is None or not gradient.dim():
        return 0.0
    dim = held.layout.dim
    padding = torch.ones(gradient.shape[dim], dtype=torch.bool, device=gradient.device)
    for segment in held.layout.segments:
        padding[segment.start : segment.start + segment.length] = False
    return apart.norm(gradient.movedim(dim, 0)[padding])
