"""Losses over a sharded vocabulary and steps that clip, for tensor-parallel programs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from tests.planted.tp_megatron import Reduce, run
from tests.planted.tp_model import loss

MAX_NORM = 0.05  # far below any gradient of the tiny model: every step is clipped


def parallel_cross_entropy(model: Any, batch: dict[str, Tensor]) -> Tensor:
    """Cross entropy where each rank has logits of its part of the vocabulary; of the whole in one process."""
    return _cross_entropy(model, batch, reduce=True)


def local_cross_entropy(model: Any, batch: dict[str, Tensor]) -> Tensor:
    """The same, but normalised over the rank's own part."""
    return _cross_entropy(model, batch, reduce=False)


def lossy_cross_entropy(model: Any, batch: dict[str, Tensor]) -> Tensor:
    """The same as the first, but the first token of each part is no rank's."""
    return _cross_entropy(model, batch, reduce=True, lost=1)


def unwrapped(model: Any) -> Any:
    """What DistributedDataParallel holds, where a check has wrapped the model so."""
    return getattr(model, "module", model)


def _cross_entropy(model: Any, batch: dict[str, Tensor], *, reduce: bool, lost: int = 0) -> Tensor:
    head = unwrapped(model).head
    if not hasattr(head, "how"):
        return loss(model, batch)
    logits, targets, how = model(batch["x"]), batch["y"], head.how
    start, size = sum(head.sizes[: how.rank]), logits.size(-1)
    highest = logits.detach().amax(-1)
    dist.all_reduce(highest, op=dist.ReduceOp.MAX, group=how.group)
    shifted = logits - highest[..., None]
    mass = shifted.exp().sum(-1)
    if reduce:
        mass = run(Reduce, mass, how.group)
    elsewhere = (targets < start + min(lost, start)) | (targets >= start + size)
    own = shifted.gather(-1, (targets - start).masked_fill(elsewhere, 0)[..., None])[..., 0]
    chosen = run(Reduce, own.masked_fill(elsewhere, 0.0), how.group)
    value: Tensor = (mass.log() - chosen).mean()
    return value


def clipped(clip: Callable[[list[Any]], None]) -> Callable[..., Tensor]:
    """A step that calls ``clip`` on the parameters that have a gradient."""

    def step(model: Any, optimizer: Any, micro_batches: Sequence[Any]) -> Tensor:
        optimizer.zero_grad()
        value = torch.zeros(())
        for batch in micro_batches:
            one = loss(model, batch) / len(micro_batches)
            one.backward()
            value = value + one.detach()
        clip([parameter for parameter in model.parameters() if parameter.grad is not None])
        optimizer.step()
        return value

    return step


def clip_all(parameters: list[Any]) -> None:
    """torch's own: of DTensors it takes the global norm, of plain parts the local one."""
    torch.nn.utils.clip_grad_norm_(parameters, MAX_NORM)


def clip_globally(parameters: list[Any]) -> None:
    """By the whole gradient's norm: parts are summed over ranks, what is replicated counts once."""
    cut = [parameter for parameter in parameters if hasattr(parameter, "tp_group")]
    square = torch.zeros((), dtype=torch.float64)
    for parameter in cut:
        square += parameter.grad.double().square().sum()
    if cut:
        dist.all_reduce(square, group=cut[0].tp_group)
    for parameter in parameters:
        square += 0.0 if hasattr(parameter, "tp_group") else parameter.grad.double().square().sum()
    for parameter in parameters:
        parameter.grad.mul_(min(1.0, MAX_NORM / float(square.sqrt())))


def clip_mixed(parameters: list[Any]) -> None:
    """By the norm of the whole gradient, where some are distributed tensors and some are plain."""
    from torch.distributed.tensor import DTensor
    from torch.nn.utils import get_total_norm

    cut: list[Any] = [parameter.grad for parameter in parameters if isinstance(parameter, DTensor)]
    whole: list[Any] = [parameter.grad for parameter in parameters if not isinstance(parameter, DTensor)]
    square = get_total_norm(whole).square()
    if cut:
        norm: Any = get_total_norm(cut)
        square = square + norm.full_tensor().square()
    for parameter in parameters:
        parameter.grad.mul_(min(1.0, MAX_NORM / float(square.sqrt())))
