"""``--gputrain-alone``: a distributed test as one rank in the pytest process, where debuggers work."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest


def run_alone(function: Callable[..., Any], arguments: dict[str, Any], where: str) -> None:
    """Call ``function`` with a process group of one. What is put into the process is taken out again."""
    __tracebackhide__ = True
    import torch
    import torch.distributed as dist

    with pytest.MonkeyPatch.context() as patch:
        for name, value in (("RANK", 0), ("LOCAL_RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_WORLD_SIZE", 1)):
            patch.setenv(name, str(value))
        if where != "cpu":
            torch.cuda.set_device(torch.device(where))
        store = dist.HashStore()  # type: ignore[attr-defined]
        dist.init_process_group("gloo" if where == "cpu" else "nccl", store=store, rank=0, world_size=1)
        try:
            function(**arguments)
        finally:
            if dist.is_initialized():
                dist.destroy_process_group()
