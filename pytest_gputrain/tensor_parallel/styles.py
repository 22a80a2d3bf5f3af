"""Parallel styles beside torch's own: they work in any plan that torch's ``parallelize_module`` takes."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import ColwiseParallel, ParallelStyle

from pytest_gputrain.tensor_parallel import local


class Replicated(ParallelStyle):
    """Every rank has the whole parameters and computes the same; nothing is communicated.

    summed: the ranks use the parameters on different data (a norm under sequence parallel, a norm over
    divided heads), so that gradients are summed over ranks in backward.
    """

    def __init__(self, *, summed: bool = False) -> None:
        self.summed = summed

    def __repr__(self) -> str:
        return f"Replicated(summed={self.summed})"

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        for name, parameter in list(module.named_parameters(recurse=False)):
            if not isinstance(parameter, DTensor):
                local.distribute(module, name, device_mesh, [Replicate()])
        module.forward = local.LocalForward(module, self.localize)
        return module

    def localize(self, parameter: DTensor) -> Tensor:
        return local.summed(parameter) if self.summed else local.as_is(parameter)


class KeyValueParallel(ColwiseParallel):
    """A key or value projection of ``heads`` heads: divided, or, with more ranks than heads, replicated.

    Replicated, each rank passes on the one head that its query heads attend to, and the gradient is summed
    over ranks. Needs ranks that divide the heads or heads that divide the ranks.
    """

    def __init__(self, heads: int, **layouts: Any) -> None:
        super().__init__(**layouts)
        self.heads = heads

    def __repr__(self) -> str:
        return f"KeyValueParallel({self.heads})"

    def is_divided(self, world_size: int) -> bool:
        return self.heads % world_size == 0

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        if self.is_divided(device_mesh.size()):
            return super()._apply(module, device_mesh)
        return _replicate_heads(self, module, device_mesh)


def _replicate_heads(style: KeyValueParallel, module: nn.Module, mesh: DeviceMesh) -> nn.Module:
    def as_replica(_: nn.Module, inputs: Any) -> Any:
        x = inputs[0]
        if not isinstance(x, DTensor):
            x = DTensor.from_local(x, mesh, style.input_layouts, run_check=False)
        return (x.redistribute(placements=[Replicate()]), *inputs[1:])

    def own_head(_: nn.Module, inputs: Any, whole: DTensor) -> Any:
        # One head a rank, of which each takes its own: so no rank is asked for its number.
        each = whole.to_local().unflatten(-1, (style.heads, 1, -1))
        each = each.expand(*each.shape[:-2], mesh.size() // style.heads, -1).flatten(-3)
        given = DTensor.from_local(each, mesh, [Replicate()], run_check=False)
        return given.redistribute(placements=[Shard(-1)]).to_local()

    for name, _parameter in list(module.named_parameters(recurse=False)):
        local.distribute(module, name, mesh, [Replicate()])
    module.register_forward_pre_hook(as_replica)
    module.register_forward_hook(own_head)
    return module
