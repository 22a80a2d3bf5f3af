"""Modules that compute on this rank's part of their own parameters.

A parameter is kept as a DTensor, so that optimizers, clipping and checkpoints see one kind of parameter;
while the module's own forward runs, it sees plain local tensors. So any module works, whatever operations it
is made of. Not covered: a parameter that another module's forward reads (``nn.MultiheadAttention``); those
stay plain.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Replicate, distribute_tensor
from torch.distributed.tensor.placement_types import Placement

Localize = Callable[[DTensor], Tensor]


def as_is(parameter: DTensor) -> Tensor:
    """This rank's part; its gradient is this part's, or on replicated parameters the same on every rank."""
    local: Tensor = parameter.to_local()
    return local


def summed(parameter: DTensor) -> Tensor:
    """A replicated parameter whose gradients on the ranks are parts of a sum (each rank used it on other
    data).
    """
    # Redistribution to the same placement costs nothing forward and is an all-reduce backward.
    same = parameter.redistribute(placements=[Replicate()])
    local: Tensor = same.to_local(grad_placements=[Partial()])
    return local


class LocalForward:
    """A module's forward with its DTensor parameters exchanged for local tensors while it runs."""

    def __init__(self, module: nn.Module, localize: Localize) -> None:
        self.module = module
        self.localize = localize
        self.inner = module.forward

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        parameters = self.module._parameters
        kept = dict(parameters)
        try:
            for name, parameter in kept.items():
                if isinstance(parameter, DTensor):
                    parameters[name] = self.localize(parameter)
            return self.inner(*args, **kwargs)
        finally:
            parameters.update(kept)


def distribute(module: nn.Module, name: str, mesh: DeviceMesh, placements: Sequence[Placement]) -> None:
    """Exchange a parameter of ``module`` for a DTensor with rank 0's values."""
    parameter = getattr(module, name)
    value = distribute_tensor(parameter.detach(), mesh, placements)
    module.register_parameter(name, nn.Parameter(value, requires_grad=parameter.requires_grad))


class _SumBackward(torch.autograd.Function):
    """Identity forward, all-reduce backward: the input of a sharded computation (Megatron's f)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, mesh: DeviceMesh) -> Tensor:
        ctx.mesh = mesh
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        return DTensor.from_local(gradient, ctx.mesh, [Partial()], run_check=False).full_tensor(), None


def shared_input(x: Tensor, mesh: DeviceMesh) -> Tensor:
    """``x`` as it is; its gradient is the sum over the ranks."""
    apply: Any = _SumBackward.apply
    value: Tensor = apply(x, mesh)
    return value
