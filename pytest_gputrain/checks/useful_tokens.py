"""How many tokens of a batch count, and how many are padding, as far as the batch itself says.

By ``num_targets`` where the case has it, else by a tensor that is a mask (zeros and ones, named so), else by
labels of -100, which cross entropy leaves out. None where there is no such thing.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from pytest_gputrain.case import TrainingCase, pytree

# What torch's cross entropy leaves out by default.
IGNORED = -100


def count(case: TrainingCase, batch: Any) -> tuple[int, int] | None:
    """(useful, all) tokens; None where the batch does not say."""
    leaves = [(path, leaf) for path, leaf in pytree.leaves(batch) if pytree.is_tensor(leaf)]
    whole = next((leaf.numel() for _, leaf in leaves if leaf.dim() == 2 and _is_integer(leaf)), None)
    if case.num_targets is not None and whole:
        return min(int(case.num_targets(batch)), whole), whole
    return next(_said(leaves), None)


def _said(leaves: list[tuple[str, Any]]) -> Iterator[tuple[int, int]]:
    for path, leaf in leaves:
        if "mask" in path.lower() and leaf.dim() == 2 and bool(((leaf == 0) | (leaf == 1)).all()):
            yield int(leaf.sum()), leaf.numel()
    for _, leaf in leaves:
        if leaf.dim() == 2 and _is_integer(leaf) and bool((leaf == IGNORED).any()):
            yield int((leaf != IGNORED).sum()), leaf.numel()


def _is_integer(leaf: Any) -> bool:
    return not leaf.is_floating_point() and not leaf.is_complex()
