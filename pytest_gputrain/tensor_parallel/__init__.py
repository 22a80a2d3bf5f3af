"""Tensor parallel: plans, and the golden comparison with an independent single-process reference.

Importing this package imports no torch: its functions are fetched when first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pytest_gputrain.tensor_parallel.apply import parallelize
    from pytest_gputrain.tensor_parallel.plan import tp_plan_for
    from pytest_gputrain.tensor_parallel.validate import validate_mesh, validate_plan

_LAZY = {
    "parallelize": "apply",
    "tp_plan_for": "plan",
    "validate_mesh": "validate",
    "validate_plan": "validate",
}

__all__ = ["parallelize", "tp_plan_for", "validate_mesh", "validate_plan"]


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(f"{__name__}.{_LAZY[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
