"""How many tokens a batch holds, and how many of them are of use: padding is computed, and teaches nothing.

A batch is any nesting of tensors, or a list of micro-batches, each of which is one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from pytest_gputrain.case.pytree import tensors

# Where people keep what goes into the model, what the loss compares with, and what is no padding.
INPUTS = ("input_ids", "inputs", "idx", "tokens", "x")
TARGETS = ("labels", "targets", "y")
ATTENTION_MASK = "attention_mask"
IGNORED = -100  # cross_entropy's default


@dataclass(frozen=True)
class BatchTokens:
    """shape: of the inputs, of the first micro-batch; unit: "tokens", or "samples" where these are none.

    total: units that go through the model. useful: those of them that count; None where nothing tells.
    """

    shape: tuple[int, ...]
    num_micro_batches: int
    unit: str
    total: int
    useful: int | None


def tokens_of(batch: Any, num_targets: Callable[[Any], int] | None = None) -> BatchTokens:
    """Count, on whatever device the batch is, which waits for that device.

    Useful are the tokens that ``num_targets(batch)`` counts; without it those whose target is not -100; or
    those that an attention mask shows. A batch without tensors has the shape () and no samples.
    """
    parts = micro_batches_of(batch)
    inputs = [_inputs(part) for part in parts]
    shapes = [tuple(map(int, tensor.shape)) if tensor is not None else () for tensor in inputs]
    are_tokens = all(tensor is not None and _is_tokens(tensor) for tensor in inputs)
    counts = [_useful(part, num_targets) for part in parts] if are_tokens else [None]
    return BatchTokens(
        shape=shapes[0] if shapes else (),
        num_micro_batches=len(parts),
        unit="tokens" if are_tokens else "samples",
        total=sum(shape[0] * (shape[1] if are_tokens else 1) for shape in shapes if shape),
        useful=None if None in counts else sum(count for count in counts if count is not None),
    )


def micro_batches_of(batch: Any) -> list[Any]:
    """A list of batches as it is, anything else as the only one: a list of tensors is one batch."""
    is_list = isinstance(batch, list) and bool(batch)
    return batch if is_list and all(isinstance(part, Mapping | tuple | list) for part in batch) else [batch]


def _inputs(batch: Any) -> Any:
    """The tensor that goes into the model: by its name, else the first with two dimensions, else any."""
    if isinstance(batch, Mapping):
        named = [batch[name] for name in INPUTS if name in batch]
        if found := tensors(named):
            return found[0]
    found = [tensor for tensor in tensors(batch) if tensor.dim()]
    return next((tensor for tensor in found if tensor.dim() > 1), found[0] if found else None)


def _is_tokens(tensor: Any) -> bool:
    return tensor.dim() == 2 and not tensor.is_floating_point() and not tensor.is_complex()


def _useful(batch: Any, num_targets: Callable[[Any], int] | None) -> int | None:
    if num_targets is not None:
        return int(num_targets(batch))
    if not isinstance(batch, Mapping):
        return None
    for name in TARGETS:
        for tensor in tensors(batch.get(name)):
            if _is_tokens(tensor):
                return int((tensor != IGNORED).sum())
    for tensor in tensors(batch.get(ATTENTION_MASK)):
        if tensor.dim() == 2:
            return int((tensor != 0).sum())
    return None
