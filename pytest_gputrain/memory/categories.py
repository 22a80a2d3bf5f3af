"""The kinds of memory that training needs, in the order in which reports show them.

``parameters``, ``gradients``, ``optimizer state`` and ``buffers`` are told by identity: a tensor belongs
there because a module or an optimizer holds it. ``activations`` is everything else that forward and backward
make, among it what backward needs for a moment. ``other``: input batches, temporaries of the optimizer step.
"""

from __future__ import annotations

from collections.abc import Mapping

from pytest_gputrain.values import format_size

PARAMETERS = "parameters"
GRADIENTS = "gradients"
OPTIMIZER_STATE = "optimizer state"
ACTIVATIONS = "activations"
BUFFERS = "buffers"
OTHER = "other"

CATEGORIES = (PARAMETERS, GRADIENTS, OPTIMIZER_STATE, ACTIVATIONS, BUFFERS, OTHER)


def nothing() -> dict[str, int]:
    """Return 0 bytes in each category."""
    return dict.fromkeys(CATEGORIES, 0)


def describe(by_category: Mapping[str, int]) -> str:
    """``activations 1.2 GiB, parameters 300.0 MiB``: the largest first, empty ones left out."""
    parts = sorted(by_category.items(), key=lambda pair: -pair[1])
    return ", ".join(f"{name} {format_size(size)}" for name, size in parts if size) or "nothing"
