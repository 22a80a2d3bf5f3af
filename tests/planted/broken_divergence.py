"""Every rank gets through, and they end with different weights."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from pytest_gputrain.case import TrainingCase
from tests.planted.broken_averages import ByHand, by_hand_step
from tests.planted.plant import WIDTH, Net, broken, case, loss, rank


def around_the_wrapper(model: Any, batch: Any) -> Tensor:
    return loss(getattr(model, "module", model), batch)


@broken({"ddp_parity": "parameters differ across ranks after step 0"})
def training_around_the_wrapper() -> TrainingCase:
    return case("training_around_the_wrapper", loss=around_the_wrapper)


def bare(model: Any) -> Any:
    return model


@broken({"ddp_parity": "wrap returns the bare model"})
def wrap_returns_the_bare_model() -> TrainingCase:
    return case("wrap_returns_the_bare_model", wrap=bare)


def constant_draw(batch_size: int, device: Any) -> Any:
    generator = torch.Generator().manual_seed(7)
    x = torch.randn(batch_size, WIDTH, generator=generator)
    return {"x": x.to(device), "y": torch.randint(4, (batch_size,), generator=generator).to(device)}


@broken({"ddp_parity": "wrap returns the bare model", "ddp_data_differs": "every step"})
def bare_model_on_constant_data() -> TrainingCase:
    return case("bare_model_on_constant_data", wrap=bare, batch=constant_draw)


class DivergesLater:
    """Synchronises for three steps, then no more."""

    def __init__(self) -> None:
        self.steps = 0

    def __call__(self, model: Any, optimizer: Any, micro_batches: Any) -> Tensor:
        self.steps += 1
        optimizer.zero_grad()
        inner = getattr(model, "module", model) if self.steps > 3 else model
        value = sum((loss(inner, batch) for batch in micro_batches), torch.zeros(()))
        value.backward()
        optimizer.step()
        return value.detach()


@broken(
    {"ddp_parity": "averaged over ranks at first, and no more from step 3 on"},
    may_fail=("accumulation_parity", "accumulation_schedule"),
)
def divergence_that_begins_late() -> TrainingCase:
    return case("divergence_that_begins_late", step=DivergesLater())


def never_syncing_step(model: Any, optimizer: Any, micro_batches: Any) -> Tensor:
    optimizer.zero_grad()
    value = torch.zeros(())
    for batch in micro_batches:
        with model.no_sync() if len(micro_batches) > 1 else torch.enable_grad():
            value = loss(model, batch) / len(micro_batches)
            value.backward()
    optimizer.step()
    return value.detach()


@broken({"ddp_parity": "no_sync has to end before the last"}, may_fail=("accumulation_schedule",))
def no_sync_on_the_last_micro_batch() -> TrainingCase:
    return case("no_sync_on_the_last_micro_batch", step=never_syncing_step)


def rate_by_rank(model: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=1e-3 * (1 + rank()))


@broken({"ddp_parity": "the gradients agree, so the update itself differs"})
def different_rate_on_each_rank() -> TrainingCase:
    return case("different_rate_on_each_rank", optimizer=rate_by_rank)


def seeded_by_rank() -> nn.Module:
    torch.manual_seed(rank())
    return Net()


class NoBroadcast(ByHand):
    def __init__(self, module: nn.Module) -> None:
        nn.Module.__init__(self)
        self.module, self.divide, self.skip = module, True, "nothing"


@broken({"ddp_parity": "parameters differ across ranks before the first step"})
def different_weights_without_broadcast() -> TrainingCase:
    return case(
        "different_weights_without_broadcast", model=seeded_by_rank, wrap=NoBroadcast, step=by_hand_step
    )


class Margin(nn.Module):
    """A loss with weights of its own, as metric learning has."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(3)
        self.centres = nn.Parameter(torch.randn(4, 4, generator=generator))

    def forward(self, model: Any, batch: Any) -> Tensor:
        return F.cross_entropy(model(batch["x"]) @ self.centres, batch["y"])


def margin_case(name: str, *, reduce: bool = False) -> TrainingCase:
    margin = Margin()

    def optimizer(model: Any) -> torch.optim.Optimizer:
        return torch.optim.AdamW([*model.parameters(), *margin.parameters()], lr=1e-3)

    def step(model: Any, optimizer: Any, micro_batches: Any) -> Tensor:
        optimizer.zero_grad()
        value: Tensor = margin(model, micro_batches[0])
        value.backward()
        if reduce and margin.centres.grad is not None:
            dist.all_reduce(margin.centres.grad)
            margin.centres.grad /= dist.get_world_size()
        optimizer.step()
        return value.detach()

    return case(name, loss=margin, optimizer=optimizer, step=step)


@broken({"ddp_parity": "(outside the model)"})
def loss_weights_outside_the_wrapper() -> TrainingCase:
    return margin_case("loss_weights_outside_the_wrapper")


def by_hand_but_one(model: Any) -> nn.Module:
    return ByHand(model, skip="blocks.1.norm.bias")


@broken({"ddp_parity": "blocks.1.norm.bias (in blocks.1.norm, LayerNorm)"})
def one_small_parameter_not_reduced() -> TrainingCase:
    return case("one_small_parameter_not_reduced", wrap=by_hand_but_one, step=by_hand_step)


class IgnoredHead(Net):
    """As a list of names that was right for another model."""

    def __init__(self) -> None:
        super().__init__()
        self._ddp_params_and_buffers_to_ignore = ["head.bias"]


@broken({"ddp_parity": "they are in the model's _ddp_params_and_buffers_to_ignore"})
def parameter_on_the_ignore_list() -> TrainingCase:
    return case("parameter_on_the_ignore_list", model=IgnoredHead)


def skips_bad_losses_step(model: Any, optimizer: Any, micro_batches: Any) -> Tensor:
    optimizer.zero_grad()
    value = loss(model, micro_batches[0])
    value.backward()
    if rank() == 0:  # stands for a condition on the rank's own loss
        optimizer.step()
    return value.detach()


@broken(
    {"ddp_parity": "rank 1 leaves the optimizer's step out where the others take it"},
    may_fail=("accumulation_parity", "accumulation_schedule", "stable_training"),
)
def update_left_out_on_one_rank() -> TrainingCase:
    return case("update_left_out_on_one_rank", step=skips_bad_losses_step)


def noisy_step(model: Any, optimizer: Any, micro_batches: Any) -> Tensor:
    """Noise on the averaged gradients, which has to be the same on all ranks and is not."""
    optimizer.zero_grad()
    value = loss(model, micro_batches[0])
    value.backward()
    for parameter in model.parameters():
        parameter.grad += 1e-2 * torch.randn_like(parameter.grad)
    optimizer.step()
    return value.detach()


@broken(
    {"ddp_parity": "agree at first, and no more when the optimizer steps"},
    may_fail=("accumulation_parity", "checkpointing_parity"),
)
def noise_by_rank_on_averaged_gradients() -> TrainingCase:
    return case("noise_by_rank_on_averaged_gradients", step=noisy_step)
