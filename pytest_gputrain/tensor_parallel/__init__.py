"""Tensor parallel: plans, and the golden comparison with an independent single-process reference.

Importing this package imports no torch: its functions are fetched when first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pytest_gputrain.tensor_parallel.apply import parallelize
    from pytest_gputrain.tensor_parallel.golden_account import account
    from pytest_gputrain.tensor_parallel.golden_backward import compare_backward
    from pytest_gputrain.tensor_parallel.golden_checkpoint import compare_checkpoint
    from pytest_gputrain.tensor_parallel.golden_forward import compare_forward
    from pytest_gputrain.tensor_parallel.golden_optimizers import compare_optimizers
    from pytest_gputrain.tensor_parallel.golden_vacuity import vacuity
    from pytest_gputrain.tensor_parallel.plan import tp_plan_for
    from pytest_gputrain.tensor_parallel.validate import validate_mesh, validate_plan

_LAZY = {
    "account": "golden_account",
    "compare_backward": "golden_backward",
    "compare_checkpoint": "golden_checkpoint",
    "compare_forward": "golden_forward",
    "compare_optimizers": "golden_optimizers",
    "parallelize": "apply",
    "tp_plan_for": "plan",
    "validate_mesh": "validate",
    "vacuity": "golden_vacuity",
    "validate_plan": "validate",
}

__all__ = [
    "account",
    "compare_backward",
    "compare_checkpoint",
    "compare_forward",
    "compare_optimizers",
    "parallelize",
    "tp_plan_for",
    "vacuity",
    "validate_mesh",
    "validate_plan",
]


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(f"{__name__}.{_LAZY[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
