"""Comparisons on two gloo ranks."""

from __future__ import annotations

import importlib
from functools import partial
from typing import Any

from pytest_gputrain import launch
from tests.tensor_parallel import models

HOMES = {
    "compare_forward": "golden_forward",
    "compare_backward": "golden_backward",
    "compare_optimizers": "golden_optimizers",
    "compare_checkpoint": "golden_checkpoint",
    "account": "golden_account",
    "vacuity": "golden_vacuity",
}


def body(function: str, case: Any, arguments: dict[str, Any]) -> Any:
    """What a rank runs."""
    import torch
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh

    torch.set_num_threads(1)
    module = importlib.import_module(f"pytest_gputrain.tensor_parallel.{HOMES[function]}")
    mesh = init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("tp",))
    return getattr(module, function)(case(), mesh, **arguments)


def on_two_ranks(function: str, parallelize: Any, /, arguments: Any = None, **fields: Any) -> Any:
    """The record, which is the same on both ranks."""
    first, second = _records(function, parallelize, arguments, fields)
    assert first == second
    return first


def problem_on_two_ranks(function: str, parallelize: Any, /, arguments: Any = None, **fields: Any) -> Any:
    """What is told, the same on both ranks, where figures may be NaN or of different batches."""
    first, second = _records(function, parallelize, arguments, fields)
    assert first.problem == second.problem
    return first.problem


def _records(function: str, parallelize: Any, arguments: Any, fields: dict[str, Any]) -> list[Any]:
    case = partial(models.case, parallelize, **fields)
    return launch(body, function, case, arguments or {}, world_size=2, timeout=120).values
