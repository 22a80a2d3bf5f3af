"""The case's own data at the batch size found: as many samples, as long as the stream's batches are.

Of the stream's batches those that can be cut or repeated to a number of samples: every tensor has a row a
sample, or none. The first of each shape, the largest of those that there is time to draw, and the last with
as few samples as it has.
"""

from __future__ import annotations

import itertools
import time
from dataclasses import dataclass
from typing import Any

from pytest_gputrain.case import TrainingCase, pytree
from pytest_gputrain.checks.batch_runs import num_bytes
from pytest_gputrain.checks.context import CheckContext

SHAPES = 8
MAX_DRAWN, DRAWING_SECONDS = 2000, 1.0


@dataclass(frozen=True, eq=False)
class Taken:
    """A batch of the stream: which one, and at the batch size found."""

    index: int
    batch: Any


def chosen(case: TrainingCase, ctx: CheckContext, batch_size: int) -> list[Taken]:
    """In the order in which they come; none where the case has no stream of its own."""
    from pytest_gputrain.checks.session import seed_everything, seed_for, stream

    if not case.has_own_batches:
        return []
    seed_everything(seed_for(ctx, 0))
    first: dict[str, Taken] = {}
    largest: Taken | None = None
    last: Any = None
    deadline, index = time.monotonic() + DRAWING_SECONDS, -1
    for index, batch in enumerate(itertools.islice(stream(case, ctx), MAX_DRAWN)):
        sized = with_rows(batch, batch_size)
        if sized is not None:
            taken = Taken(index, sized)
            if largest is None or num_bytes(sized) > num_bytes(largest.batch):
                largest = taken
            if len(first) < SHAPES:
                first.setdefault(shapes(sized), taken)
        last = batch
        if time.monotonic() > deadline:
            break
    found = list(first.values())
    if largest is not None and largest not in found:
        found.append(largest)
    if last is not None and (rows := _rows(last)) and rows < batch_size:
        found.append(Taken(index, last))
    return found


def with_rows(batch: Any, rows: int) -> Any | None:
    """The batch with so many samples, its own again and again; None where it has no row a sample."""
    import torch

    own = _rows(batch)
    if own is None:
        return None
    index = torch.arange(rows) % own
    return pytree.map_tensors(lambda t: t[index.to(t.device)] if t.dim() > 0 else t, batch)


def shapes(batch: Any) -> str:
    """``(5, 16) and (5, 16)``, for a message."""
    return " and ".join(str(tuple(tensor.shape)) for tensor in pytree.tensors(batch)[:3])


def _rows(batch: Any) -> int | None:
    """Samples in the batch; None where its tensors disagree."""
    lengths = {int(tensor.shape[0]) for tensor in pytree.tensors(batch) if tensor.dim() > 0}
    return lengths.pop() if len(lengths) == 1 and lengths != {0} else None
