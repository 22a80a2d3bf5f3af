"""The ranks agree, on gradients that are not the average."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel as DDP

from pytest_gputrain.case import TrainingCase
from tests.planted.plant import broken, case, draw, loss


def summing(model: Any) -> nn.Module:
    wrapped = DDP(model)

    def hook(state: Any, bucket: Any) -> Any:  # DDP reads annotations, and these are strings here
        work = dist.all_reduce(bucket.buffer(), async_op=True)
        return work.get_future().then(lambda future: future.value()[0])

    hook.__annotations__.clear()
    wrapped.register_comm_hook(None, hook)
    return wrapped


@broken(
    {"ddp_parity": "gradients are 2.000 x the single-process reference on every rank (14 of 14 parameters)"}
)
def comm_hook_that_does_not_divide() -> TrainingCase:
    return case("comm_hook_that_does_not_divide", wrap=summing)


def clipping_step(model: Any, optimizer: Any, micro_batches: Any) -> Tensor:
    optimizer.zero_grad()
    total = torch.zeros(())
    for index, batch in enumerate(micro_batches):
        last = index == len(micro_batches) - 1
        with torch.enable_grad() if last else model.no_sync():
            value = loss(model, batch) / len(micro_batches)
            value.backward()
        total = total + value.detach()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
    optimizer.step()
    return total


@broken({"ddp_parity": "gradients are 2.000 x"})
def clipping_hides_the_scale() -> TrainingCase:
    return case("clipping_hides_the_scale", wrap=summing, step=clipping_step)


def divides_again_step(model: Any, optimizer: Any, micro_batches: Any) -> Tensor:
    optimizer.zero_grad()
    value = loss(model, micro_batches[0])
    value.backward()
    for parameter in model.parameters():
        parameter.grad /= dist.get_world_size()  # DDP has done so already
    optimizer.step()
    return value.detach()


@broken({"ddp_parity": "at the optimizer step, gradients are 0.500 x"})
def divided_twice() -> TrainingCase:
    return case("divided_twice", step=divides_again_step)


class ByHand(nn.Module):
    """Averages by hand after backward; ``finish`` has to be called by the step."""

    def __init__(self, module: nn.Module, divide: bool = True, skip: str = "nothing") -> None:
        super().__init__()
        self.module, self.divide, self.skip = module, divide, skip
        for parameter in module.parameters():
            dist.broadcast(parameter.data, 0)

    def forward(self, x: Tensor) -> Any:
        return self.module(x)

    def finish(self) -> None:
        for name, parameter in self.module.named_parameters():
            if parameter.grad is not None and name != self.skip:
                dist.all_reduce(parameter.grad)
                if self.divide:
                    parameter.grad /= dist.get_world_size()


def by_hand_step(model: Any, optimizer: Any, micro_batches: Any) -> Tensor:
    optimizer.zero_grad()
    total = torch.zeros(())
    for batch in micro_batches:
        value = loss(model, batch) / len(micro_batches)
        value.backward()
        total = total + value.detach()
    if hasattr(model, "finish"):
        model.finish()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
    optimizer.step()
    return total


def by_hand_without_dividing(model: Any) -> nn.Module:
    return ByHand(model, divide=False)


@broken({"ddp_parity": "gradients are 2.000 x"})
def manual_all_reduce_that_does_not_divide() -> TrainingCase:
    return case("manual_all_reduce_that_does_not_divide", wrap=by_hand_without_dividing, step=by_hand_step)


class FirstRankOnly(ByHand):
    def finish(self) -> None:
        for parameter in self.module.parameters():
            if parameter.grad is not None:
                dist.broadcast(parameter.grad, 0)


@broken({"ddp_parity": "rank 0's gradients are used on every rank"})
def every_rank_takes_rank_0s_gradient() -> TrainingCase:
    return case("every_rank_takes_rank_0s_gradient", wrap=FirstRankOnly, step=by_hand_step)


class Rebroadcast(ByHand):
    """Never averages; hides it by sending rank 0's weights around after the update."""

    def finish(self) -> None:
        return None


def rebroadcast_step(model: Any, optimizer: Any, micro_batches: Any) -> Tensor:
    optimizer.zero_grad()
    value = loss(model, micro_batches[0])
    value.backward()
    optimizer.step()
    for parameter in model.parameters():
        dist.broadcast(parameter.data, 0)
    return value.detach()


@broken({"ddp_parity": "updates differ from the single-process reference"})
def weights_are_sent_around_instead() -> TrainingCase:
    return case("weights_are_sent_around_instead", wrap=Rebroadcast, step=rebroadcast_step)


def ragged_draw(batch_size: int, device: Any) -> Any:
    batch = draw(batch_size, device)
    batch["y"][torch.rand(batch_size) < 0.4] = -100
    batch["y"][0] = 1
    return batch


def token_loss(model: Any, batch: Any) -> Tensor:
    return F.cross_entropy(model(batch["x"]), batch["y"], ignore_index=-100)


def num_targets(batch: Any) -> int:
    return int((batch["y"] != -100).sum())


def plain_average_step(model: Any, optimizer: Any, micro_batches: Any) -> Tensor:
    optimizer.zero_grad()
    value = torch.zeros(())
    total = sum(map(num_targets, micro_batches))
    for batch in micro_batches:
        value = token_loss(model, batch) * num_targets(batch) / total
        value.backward()
    optimizer.step()
    return value.detach()


@broken({"ddp_parity": "a plain average of each rank's token mean"}, may_fail=("accumulation_schedule",))
def average_of_token_means() -> TrainingCase:
    return case(
        "average_of_token_means",
        batch=ragged_draw,
        loss=token_loss,
        loss_reduction="token_mean",
        num_targets=num_targets,
        step=plain_average_step,
    )


def clips_too_early_step(model: Any, optimizer: Any, micro_batches: Any) -> Tensor:
    optimizer.zero_grad()
    value = loss(model, micro_batches[0])
    value.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 0.01)
    if hasattr(model, "finish"):
        model.finish()
    optimizer.step()
    return value.detach()


@broken({"ddp_parity": "each rank clips or scales its own gradients"})
def clips_before_it_averages() -> TrainingCase:
    return case("clips_before_it_averages", wrap=ByHand, step=clips_too_early_step)
