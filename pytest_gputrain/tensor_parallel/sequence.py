"""Sequence parallel: between attention and MLP each rank has its part of the sequence, not all of it.

The first layer's input is divided and the last layer's output gathered; attention and MLP gather their input
and give back a part of the sum. What lies between (norms, dropout, residuals) works on a part, so that the
gradients of its parameters are summed over the ranks. Lengths that the ranks do not divide give parts as
``torch.chunk`` does. Hidden states that a model hands out from between its layers are parts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import ColwiseParallel, ParallelStyle, RowwiseParallel

LENGTH = 1  # the dimension of the sequence in (batch, length, channels)
_INPUTS = ("hidden_states", "x", "input", "inputs")


@dataclass
class Sequence:
    """The whole batch's shape, which the styles of one model know together."""

    batch: int = 0
    length: int = 0

    def whole(self, x: Tensor, mesh: DeviceMesh) -> DTensor:
        """The sequence of which ``x`` is this rank's part, (batch, part, channels) or (batch * part,
        channels).
        """
        part = x.unflatten(0, (self.batch, -1)) if x.dim() == LENGTH + 1 else x
        shape = torch.Size((part.size(0), self.length, *part.shape[LENGTH + 1 :]))
        stride = (shape[1] * part.shape[-1], part.shape[-1], 1)
        given = DTensor.from_local(part, mesh, [Shard(LENGTH)], run_check=False, shape=shape, stride=stride)
        gathered: DTensor = given.redistribute(placements=[Replicate()])
        return gathered


def _with_first(args: Any, kwargs: Any, change: Any) -> Any:
    """The same arguments with the first tensor, by position or by a known name, changed."""
    if args and isinstance(args[0], Tensor):
        return (change(args[0]), *args[1:]), kwargs
    for name in _INPUTS:
        if isinstance(kwargs.get(name), Tensor):
            return args, {**kwargs, name: change(kwargs[name])}
    known = ", ".join(_INPUTS)
    raise ValueError(f"a layer was called without its input; known are a first argument and {known}")


class SequenceLayer(ParallelStyle):
    """The first layer divides its input, the last one gathers its output, or the first one of its outputs."""

    def __init__(self, sequence: Sequence, *, first: bool, last: bool) -> None:
        self.sequence, self.first, self.last = sequence, first, last

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        def divide(x: Tensor) -> Tensor:
            self.sequence.batch, self.sequence.length = x.size(0), x.size(LENGTH)
            whole = DTensor.from_local(x, device_mesh, [Replicate()], run_check=False)
            part: Tensor = whole.redistribute(placements=[Shard(LENGTH)]).to_local()
            return part

        def gather(_: nn.Module, inputs: Any, output: Any) -> Any:
            if isinstance(output, tuple):
                return (self.sequence.whole(output[0], device_mesh).to_local(), *output[1:])
            return self.sequence.whole(output, device_mesh).to_local()

        if self.first:
            module.register_forward_pre_hook(
                lambda _, args, kwargs: _with_first(args, kwargs, divide), with_kwargs=True
            )
        if self.last:
            module.register_forward_hook(gather)
        return module


class SequenceGather(ParallelStyle):
    """An attention or MLP that sees the whole sequence: its input is gathered once for all its columns."""

    def __init__(self, sequence: Sequence) -> None:
        self.sequence = sequence

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        def gather(_: nn.Module, args: Any, kwargs: Any) -> Any:
            return _with_first(args, kwargs, lambda x: self.sequence.whole(x, device_mesh))

        module.register_forward_pre_hook(gather, with_kwargs=True)
        return module


class SequenceColwise(ColwiseParallel):
    """A column layer that gathers its own input."""

    def __init__(self, sequence: Sequence) -> None:
        super().__init__()
        self.sequence = sequence

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        flat: list[bool] = []

        def gather(_: nn.Module, inputs: Any) -> Any:
            x = inputs[0]
            flat[:] = [x.dim() == LENGTH + 1]
            return (self.sequence.whole(x, device_mesh), *inputs[1:])

        def flatten(_: nn.Module, inputs: Any, output: Tensor) -> Tensor:
            return output.flatten(0, 1) if flat[0] else output

        module.register_forward_pre_hook(gather)
        super()._apply(module, device_mesh)
        module.register_forward_hook(flatten)
        return module


class SequenceRowwise(RowwiseParallel):
    """A row layer that gives this rank's part of the sequence: a reduce-scatter in the place of an
    all-reduce.
    """

    def __init__(self, sequence: Sequence) -> None:
        super().__init__(output_layouts=Shard(LENGTH))
        self.sequence = sequence

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        flat: list[bool] = []

        def unflatten(_: nn.Module, inputs: Any) -> Any:
            x = inputs[0]
            flat[:] = [x.dim() == LENGTH + 1]
            return (x.unflatten(0, (self.sequence.batch, -1)) if flat[0] else x, *inputs[1:])

        def flatten(_: nn.Module, inputs: Any, output: Tensor) -> Tensor:
            return output.flatten(0, 1) if flat[0] else output

        module.register_forward_pre_hook(unflatten)
        super()._apply(module, device_mesh)
        module.register_forward_hook(flatten)
        return module
