"""Data parallel beside tensor parallel, on the other dimension of a two-dimensional mesh.

Each rank of the data-parallel dimension has other samples. Averaged gradients leave all of the model's
shards on each of them; ``fully_shard`` (FSDP2) divides those again. `DistributedDataParallel` does not take
DTensors.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor


def same_values(model: nn.Module, mesh: DeviceMesh) -> None:
    """Give every rank of ``mesh``, a data-parallel dimension, its first rank's parameters and buffers."""
    with torch.no_grad():
        for value in (*model.parameters(), *model.buffers()):
            dist.broadcast(_local(value), group=mesh.get_group(), group_src=0)


def average_gradients(model: nn.Module, mesh: DeviceMesh) -> None:
    """Every gradient becomes the mean over ``mesh``, at each backward; so accumulation needs no
    ``no_sync``.
    """
    for parameter in model.parameters():
        if parameter.requires_grad:
            register: Any = parameter.register_hook
            register(partial(_mean, mesh))


def _mean(mesh: DeviceMesh, gradient: Tensor) -> Tensor:
    mean = gradient.clone()
    # gloo has no mean
    dist.all_reduce(_local(mean), group=mesh.get_group())
    return mean / mesh.size()


def _local(value: Tensor) -> Tensor:
    local: Any = value.to_local() if isinstance(value, DTensor) else value
    return local.wait() if hasattr(local, "wait") else local  # type: ignore[no-any-return]


def shard_again(model: nn.Module, layers: Iterable[str], mesh: DeviceMesh) -> None:
    """FSDP2 over ``mesh``: each layer of its own, then the rest."""
    for name in layers:
        fully_shard(model.get_submodule(name), mesh=mesh)
    fully_shard(model, mesh=mesh)
