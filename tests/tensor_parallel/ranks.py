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


def body(function: Any, case: Any, arguments: dict[str, Any]) -> Any:
    """What a rank runs."""
    import torch
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh

    torch.set_num_threads(1)
    if isinstance(function, str):
        home = importlib.import_module(f"pytest_gputrain.tensor_parallel.{HOMES[function]}")
        function = getattr(home, function)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("tp",))
    return function(case(), mesh, **arguments)


def on_two_ranks(function: Any, parallelize: Any, /, arguments: Any = None, **fields: Any) -> Any:
    """The record, which is the same on both ranks."""
    return on_ranks(2, function, parallelize, arguments, **fields)


def on_ranks(size: int, function: Any, parallelize: Any, /, arguments: Any = None, **fields: Any) -> Any:
    """The record, which is the same on all. function: the name of a comparison, or one itself."""
    first, *others = _records(function, parallelize, arguments, fields, size)
    assert all(other == first for other in others)
    return first


def problem_on_two_ranks(function: str, parallelize: Any, /, arguments: Any = None, **fields: Any) -> Any:
    """What is told, the same on both ranks, where figures may be NaN or of different batches."""
    first, second = _records(function, parallelize, arguments, fields)
    assert first.problem == second.problem
    return first.problem


def _records(
    function: Any, parallelize: Any, arguments: Any, fields: dict[str, Any], size: int = 2
) -> list[Any]:
    case = partial(models.case, parallelize, **fields)
    return launch(body, function, case, arguments or {}, world_size=size, timeout=120).values
