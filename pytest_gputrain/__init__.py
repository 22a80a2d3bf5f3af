"""pytest-gputrain tells the truth about training code: on every rank, on the GPUs you have, or with none.

This module is the pytest plugin (``-p pytest_gputrain``) and the public surface in one, because only then do
the entry point, ``-p`` and a bare checkout all load the same thing under the same name, never twice. It
imports no torch: public names are fetched when first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

import pytest

# Must come before anything imports the checks: their test modules keep their plain asserts otherwise.
pytest.register_assert_rewrite("pytest_gputrain.checks")

from pytest_gputrain.plugin.fixtures import (  # noqa: E402
    batch_finder,
    compile_monitor_fixture,
    ddp_launcher,
    device,
    gpu_count,
    gpus,
    grad_tracer,
    oom_guard,
    rank,
    world_size,
)
from pytest_gputrain.plugin.hooks import (  # noqa: E402
    pytest_addoption,
    pytest_collection_modifyitems,
    pytest_configure,
    pytest_pyfunc_call,
    pytest_report_header,
    pytest_runtest_makereport,
    pytest_runtest_protocol,
    pytest_runtest_setup,
    pytest_sessionstart,
    pytest_unconfigure,
)

if TYPE_CHECKING:
    from pytest_gputrain.batch.accumulation import AccumulationPlan, plan_accumulation
    from pytest_gputrain.batch.choose import choose_batch_size
    from pytest_gputrain.batch.discover import discover_batch_size
    from pytest_gputrain.batch.discovery import find_batch
    from pytest_gputrain.case import TrainingCase
    from pytest_gputrain.checks import CheckResult, parametrize_with_checks, run_checks
    from pytest_gputrain.compile.monitor import compile_monitor
    from pytest_gputrain.compile.validation import validation
    from pytest_gputrain.launch import Cause, LaunchError, LaunchResult, Verdict
    from pytest_gputrain.launch.launcher import launch
    from pytest_gputrain.memory.errors import OutOfMemory
    from pytest_gputrain.memory.estimate import estimate_memory
    from pytest_gputrain.memory.predict import predict_maximum, predict_peak_memory
    from pytest_gputrain.tensor_parallel.plan import tp_plan_for

    distributed: pytest.MarkDecorator
    requires_gpus: pytest.MarkDecorator
    stability: pytest.MarkDecorator

__version__ = "0.1.0"

# Public name -> the room it lives in. `launch` is at once that room and, because the room's module can be
# called, the function: whoever imports the room first, `from pytest_gputrain import launch` gives the same.
_LAZY = {
    "TrainingCase": "case",
    "choose_batch_size": "batch.choose",
    "discover_batch_size": "batch.discover",
    "find_batch": "batch.discovery",
    "compile_monitor": "compile.monitor",
    "validation": "compile.validation",
    "CheckResult": "checks",
    "parametrize_with_checks": "checks",
    "run_checks": "checks",
    "Cause": "launch",
    "LaunchError": "launch",
    "LaunchResult": "launch",
    "OutOfMemory": "memory.errors",
    "AccumulationPlan": "batch.accumulation",
    "plan_accumulation": "batch.accumulation",
    "Verdict": "launch",
    "estimate_memory": "memory.estimate",
    "predict_maximum": "memory.predict",
    "predict_peak_memory": "memory.predict",
    "tp_plan_for": "tensor_parallel.plan",
}
_ROOMS = ("launch",)
_MARKERS = ("distributed", "requires_gpus", "stability")

__all__ = [
    "AccumulationPlan",
    "Cause",
    "CheckResult",
    "LaunchError",
    "LaunchResult",
    "OutOfMemory",
    "TrainingCase",
    "Verdict",
    "batch_finder",
    "choose_batch_size",
    "compile_monitor",
    "compile_monitor_fixture",
    "ddp_launcher",
    "device",
    "discover_batch_size",
    "distributed",
    "estimate_memory",
    "find_batch",
    "gpu_count",
    "gpus",
    "grad_tracer",
    "launch",
    "oom_guard",
    "parametrize_with_checks",
    "plan_accumulation",
    "predict_maximum",
    "predict_peak_memory",
    "pytest_addoption",
    "pytest_collection_modifyitems",
    "pytest_configure",
    "pytest_pyfunc_call",
    "pytest_report_header",
    "pytest_runtest_makereport",
    "pytest_runtest_protocol",
    "pytest_runtest_setup",
    "pytest_sessionstart",
    "pytest_unconfigure",
    "rank",
    "requires_gpus",
    "run_checks",
    "stability",
    "tp_plan_for",
    "validation",
    "world_size",
]


# No __dir__ beside this: pytest fetches every name that dir() of a plugin shows, and so would import torch.
# Nothing is kept in globals() either: pytester forgets modules between runs in one process, and a kept class
# would be another one than that of the module imported anew.
def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(f"{__name__}.{_LAZY[name]}"), name)
    if name in _ROOMS:
        return importlib.import_module(f"{__name__}.{name}")
    if name in _MARKERS:
        return getattr(pytest.mark, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
