"""Host memory that grows because batches have ever new shapes, not because a step keeps something. Pure."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import replace

from pytest_gputrain.endurance.findings import Finding
from pytest_gputrain.endurance.records import StepRecord
from pytest_gputrain.values import format_size

ByRank = Mapping[int, Sequence[StepRecord]]

_FEWEST, _LEAST_BYTES = 8, 256 * 1024  # steps with a new shape, and without one; what is worth a word
# Of a rise in malloc's memory: what steps with a new shape have to have made. Torch settles before.
_BY_SHAPE, _SETTLED = 0.9, 0.1
_KEPT_BY_SHAPE = (
    "torch keeps what it makes for each (oneDNN up to 1,024 times); a few fixed lengths take less"
)


def of_new_shapes(records: Sequence[StepRecord]) -> str:
    """A note where malloc's memory grows in those steps alone whose batches have a shape for the first time.

    Then it is no step that keeps something, but torch: oneDNN keeps code for each shape, up to a number.
    Nothing is said where all shapes are new: that proves nothing.
    """
    known = [one for one in records[round(_SETTLED * len(records)) :] if one.heap_bytes is not None]
    rises = [
        ((later.heap_bytes or 0) - (earlier.heap_bytes or 0), later.shapes > earlier.shapes)
        for earlier, later in itertools.pairwise(known)
    ]
    total, new = sum(rise for rise, _ in rises), [rise for rise, is_new in rises if is_new]
    if not _FEWEST <= len(new) <= len(rises) - _FEWEST:
        return ""
    if total < _LEAST_BYTES or sum(new) < _BY_SHAPE * total:
        return ""
    return (
        f"host memory grew by {format_size(total)}, all of it in {len(new)} of {len(rises)} steps, whose "
        f"batches had a shape for the first time: {_KEPT_BY_SHAPE}"
    )


def with_shapes(memory: Finding, by_rank: ByRank) -> Finding:
    """Of host memory, what else it may be where nearly every batch had another shape."""
    if all(records[-1].shapes < _BY_SHAPE * len(records) for records in by_rank.values() if records):
        return memory
    return replace(memory, message=f"{memory.message}\n  every batch had another shape: {_KEPT_BY_SHAPE}")
