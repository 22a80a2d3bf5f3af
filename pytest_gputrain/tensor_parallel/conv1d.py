"""Column and row styles for GPT-2's ``Conv1D``, a linear layer with its weight the other way round.

torch's styles take Linear and Embedding only. A fused projection (queries, keys and values side by side) is
cut in each of its parts, so that a rank has the same heads of all three; the DTensor knows, and gathers to
the original.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard
from torch.distributed.tensor.parallel import ParallelStyle
from torch.distributed.tensor.placement_types import _StridedShard

from pytest_gputrain.tensor_parallel import local
from pytest_gputrain.tensor_parallel.sequence import LENGTH, Sequence


def _local_input(x: Tensor, mesh: DeviceMesh) -> Tensor:
    """A whole input that each rank uses for another part of the output: gradients are summed."""
    if isinstance(x, DTensor):  # gathered from a divided sequence
        part: Tensor = x.to_local(grad_placements=[Partial()])
        return part
    return local.shared_input(x, mesh)


class Conv1DColwise(ParallelStyle):
    """Cut by outputs. parts: how many projections stand side by side in the weight's columns."""

    def __init__(self, parts: int = 1) -> None:
        self.parts = parts

    def __repr__(self) -> str:
        return f"Conv1DColwise(parts={self.parts})"

    def _apply(self, module: Any, device_mesh: DeviceMesh) -> nn.Module:
        local.distribute(module, "weight", device_mesh, [self._cut(1)])
        local.distribute(module, "bias", device_mesh, [self._cut(0)])
        module.nf //= device_mesh.size()
        module.forward = local.LocalForward(module, local.as_is)
        module.register_forward_pre_hook(
            lambda _, inputs: (_local_input(inputs[0], device_mesh), *inputs[1:])
        )
        return module  # type: ignore[no-any-return]

    def _cut(self, dimension: int) -> Any:
        return Shard(dimension) if self.parts == 1 else _StridedShard(dimension, split_factor=self.parts)


class Conv1DRowwise(ParallelStyle):
    """Cut by inputs; outputs are summed over the ranks, and the bias added once.

    sequence: give back this rank's part of the sequence instead of all of it.
    """

    def __init__(self, sequence: Sequence | None = None) -> None:
        self.sequence = sequence

    def __repr__(self) -> str:
        return "Conv1DRowwise()"

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        placements = [Replicate() if self.sequence is None else Shard(LENGTH)]

        def summed(_: nn.Module, inputs: Any, part: Tensor) -> Tensor:
            given = DTensor.from_local(part, device_mesh, [Partial()], run_check=False)
            whole: Tensor = given.redistribute(placements=placements).to_local()
            bias: Any = module._parameters["bias"]
            return whole + (local.as_is(bias) if self.sequence is None else local.summed(bias))

        local.distribute(module, "weight", device_mesh, [Shard(0)])
        local.distribute(module, "bias", device_mesh, [Replicate()])
        module.forward = local.LocalForward(module, _without_bias)
        module.register_forward_hook(summed)
        return module


def _without_bias(parameter: DTensor) -> Tensor:
    # Summed over the ranks, a bias within would count once for each.
    own = local.as_is(parameter)
    return torch.zeros_like(own).detach() if own.dim() == 1 else own
