"""What a plan leaves undone: parameters that it does not name, and where gradients end up."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import loss_parallel

from pytest_gputrain.tensor_parallel.styles import Replicated


def replicate_rest(model: nn.Module, mesh: DeviceMesh, head_norms: Collection[nn.Module]) -> None:
    """Every parameter that is still plain becomes a replicated DTensor; its module computes on local tensors.

    head_norms: norms that see this rank's heads, whose gradients are therefore summed over the ranks.

    Left plain are the parameters of ``nn.MultiheadAttention``, whose forward reads those of its children.
    """
    shared = [module for module in model.modules() if isinstance(module, nn.MultiheadAttention)]
    left = {id(below) for module in shared for below in module.modules()}
    for module in model.modules():
        parameters = list(module.parameters(recurse=False))
        if parameters and id(module) not in left and not any(isinstance(p, DTensor) for p in parameters):
            Replicated(summed=module in head_norms)._apply(module, mesh)


def own_outputs(modules: Iterable[nn.Module]) -> None:
    """Let each module's output be changed in place, as that of the module in one piece can be.

    torch's styles hand out a view that is made in an autograd function, and autograd refuses to change one
    (Falcon: ``mlp_output += attention_output``).
    """
    for module in modules:
        module.register_forward_hook(_own)


def _own(_: nn.Module, inputs: Any, output: Any) -> Any:
    if not isinstance(output, Tensor) or isinstance(output, DTensor) or not output._is_view():
        return output
    # The same memory, no copy: nothing else reads it, as the DTensor that it is a view of is gone.
    return torch.ops.aten._unsafe_view(output, output.shape)


def settle_gradients(model: nn.Module) -> None:
    """Let every gradient arrive in its parameter's placement.

    Without this, DTensor leaves sums over ranks pending (a norm under sequence parallel) and the gradient of
    a sharded embedding whole on every rank.
    """
    for parameter in model.parameters():
        if isinstance(parameter, DTensor) and parameter.requires_grad:
            register: Any = parameter.register_hook
            register(partial(_settled, parameter.placements))


def _settled(placements: Any, gradient: Tensor) -> Tensor:
    if isinstance(gradient, DTensor) and gradient.placements != placements:
        return gradient.redistribute(placements=placements)
    return gradient


@cache
def enter_loss_parallel() -> None:
    """From here on cross entropies in this process take logits that are divided over the vocabulary.

    For the whole process, because the backward, which the model does not see, must run under it too. Only
    DTensors divided over classes are treated in another way than before.
    """
    loss_parallel().__enter__()
