"""Healthy ways to be data parallel, and losses that are joined over ranks."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks
from torch.nn.parallel import DistributedDataParallel as DDP
from torch.utils.data import DataLoader
from torch.utils.data.distributed import DistributedSampler

from pytest_gputrain.case import TrainingCase
from tests.planted.broken_averages import ByHand, by_hand_step, num_targets, ragged_draw, token_loss
from tests.planted.broken_data import dataset
from tests.planted.broken_divergence import margin_case
from tests.planted.broken_gradients import CheckpointedNet, turn_on
from tests.planted.broken_hangs import static
from tests.planted.healthy_models import with_dropout
from tests.planted.plant import case, draw, healthy, loss, rank


@healthy
def manual_all_reduce() -> TrainingCase:
    return case("manual_all_reduce", wrap=ByHand, step=by_hand_step)


@healthy
def static_graph() -> TrainingCase:
    return case("static_graph", model=CheckpointedNet, wrap=static, set_checkpointing=turn_on)


def compressed(model: Any) -> nn.Module:
    wrapped = DDP(model)
    wrapped.register_comm_hook(None, default_hooks.fp16_compress_hook)
    return wrapped


@healthy
def float16_compression() -> TrainingCase:
    return case("float16_compression", wrap=compressed)


def sum_loss(model: Any, batch: Any) -> Tensor:
    return F.cross_entropy(model(batch["x"]), batch["y"], reduction="sum")


@healthy
def summed_loss() -> TrainingCase:
    return case("summed_loss", loss=sum_loss, loss_reduction="sum")


def summed_clipping_step(model: Any, optimizer: Any, micro_batches: Any) -> Tensor:
    """Keeps the sum over ranks, then clips it."""
    optimizer.zero_grad()
    total = torch.zeros(())
    for index, batch in enumerate(micro_batches):
        model.require_backward_grad_sync = index == len(micro_batches) - 1
        value = sum_loss(model, batch) * dist.get_world_size()
        value.backward()
        total = total + value.detach()
    torch.nn.utils.clip_grad_value_(model.parameters(), 0.05)
    optimizer.step()
    return total


@healthy
def summed_loss_with_clipping() -> TrainingCase:
    return case("summed_loss_with_clipping", loss=sum_loss, loss_reduction="sum", step=summed_clipping_step)


def summed_step(model: Any, optimizer: Any, micro_batches: Any) -> Tensor:
    optimizer.zero_grad()
    total = torch.zeros(())
    for batch in micro_batches:
        value = sum_loss(model, batch)
        value.backward()
        total = total + value.detach()
    optimizer.step()
    return total


@healthy
def summed_loss_averaged_over_ranks() -> TrainingCase:
    return case("summed_loss_averaged_over_ranks", loss=sum_loss, loss_reduction="sum", step=summed_step)


@healthy
def token_mean_over_ranks() -> TrainingCase:
    return case(
        "token_mean_over_ranks",
        batch=ragged_draw,
        loss=token_loss,
        loss_reduction="token_mean",
        num_targets=num_targets,
    )


def contrastive_loss(model: Any, batch: Any) -> Tensor:
    left, right = F.normalize(model(batch["x"]), dim=-1), F.normalize(model(batch["x"] + 0.1), dim=-1)
    return F.cross_entropy(left @ right.T / 0.1, torch.arange(len(left), device=left.device))


@healthy
def contrastive() -> TrainingCase:
    return case("contrastive", loss=contrastive_loss)


def gathered(x: Tensor) -> Tensor:
    if not (dist.is_initialized() and dist.get_world_size() > 1):
        return x
    from torch.distributed.nn.functional import all_gather

    return torch.cat(all_gather(x))


def gathered_contrastive_loss(model: Any, batch: Any) -> Tensor:
    out = gathered(F.normalize(model(batch["x"]), dim=-1))
    other = gathered(F.normalize(batch["x"][:, :4], dim=-1))
    return F.cross_entropy(out @ other.T / 0.1, torch.arange(len(out), device=out.device))


@healthy
def contrastive_across_ranks() -> TrainingCase:
    return case("contrastive_across_ranks", loss=gathered_contrastive_loss)


def sharded_state(model: Any) -> Any:
    if dist.is_initialized() and dist.get_world_size() > 1:
        # Imported here: it warns, and this suite turns warnings into errors.
        from torch.distributed.optim import ZeroRedundancyOptimizer

        return ZeroRedundancyOptimizer(model.parameters(), torch.optim.AdamW, lr=1e-3)
    return torch.optim.AdamW(model.parameters(), lr=1e-3)


@healthy
def zero_redundancy_optimizer() -> TrainingCase:
    return case("zero_redundancy_optimizer", optimizer=sharded_state)


class AveragingSGD(torch.optim.SGD):
    """Averages inside its step, into buffers of its own, as optimizers with sharded state do."""

    def step(self, closure: Any = None) -> Any:
        kept = {}
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                kept[parameter] = parameter.grad
                parameter.grad = parameter.grad.clone()
                dist.all_reduce(parameter.grad)
                parameter.grad /= dist.get_world_size()
        super().step(closure)
        for parameter, gradient in kept.items():
            parameter.grad = gradient


def averaging(model: Any) -> Any:
    return AveragingSGD(model.parameters(), lr=0.1, momentum=0.9)


def itself(model: Any) -> Any:
    return model


@healthy
def optimizer_that_averages() -> TrainingCase:
    return case("optimizer_that_averages", optimizer=averaging, wrap=itself)


def sharded_batches() -> Iterator[Any]:
    rank, world = dist.get_rank(), dist.get_world_size()
    sampler: Any = DistributedSampler(dataset(), num_replicas=world, rank=rank, shuffle=True)
    for x, y in DataLoader(dataset(), batch_size=4, sampler=sampler):
        yield {"x": x, "y": y, "mask": torch.ones(4, 16)}


@healthy
def distributed_sampler() -> TrainingCase:
    return case("distributed_sampler", batches=sharded_batches)


def scattered_batches() -> Iterator[Any]:
    """Rank 0 reads, and the ranks do not take equally long."""
    rank, world = dist.get_rank(), dist.get_world_size()
    for step in range(3000):
        if rank == step % world:
            time.sleep(0.001)
        parts = [draw(4, "cpu") for _ in range(world)] if rank == 0 else None
        own: list[Any] = [None]
        dist.scatter_object_list(own, parts, src=0)
        yield own[0]


@healthy
def batches_scattered_from_rank_0() -> TrainingCase:
    return case("batches_scattered_from_rank_0", batches=scattered_batches)


@healthy
def loss_weights_averaged_by_hand() -> TrainingCase:
    return margin_case("loss_weights_averaged_by_hand", reduce=True)


class NormOverRanks(nn.Module):
    """Batch statistics over all ranks, made by hand; the bias before them has a gradient of rounding only."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.head = nn.Linear(16, 16), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.layer(x)
        moments = torch.stack([hidden.mean(0), hidden.square().mean(0)])
        if dist.is_initialized() and dist.get_world_size() > 1:
            from torch.distributed.nn.functional import all_reduce

            moments = all_reduce(moments) / dist.get_world_size()
        spread = (moments[1] - moments[0].square() + 1e-5).rsqrt()
        out: Tensor = self.head(F.gelu((hidden - moments[0]) * spread))
        return out


@healthy
def bias_before_a_norm_over_ranks() -> TrainingCase:
    return case("bias_before_a_norm_over_ranks", model=NormOverRanks)


class NoisyLoss:
    """Adds noise to the data, from a generator of its own, seeded by rank."""

    def __init__(self) -> None:
        self.generator: torch.Generator | None = None

    def __call__(self, model: Any, batch: Any) -> Tensor:
        if self.generator is None:
            self.generator = torch.Generator().manual_seed(100 + rank())
        noise = torch.randn(batch["x"].shape, generator=self.generator)
        return F.cross_entropy(model(batch["x"] + noise), batch["y"])


@healthy
def noise_seeded_by_rank() -> TrainingCase:
    return case("noise_seeded_by_rank", loss=NoisyLoss())


class ReseedingStep:
    """So that no two ranks ever drop the same units."""

    def __init__(self) -> None:
        self.steps = 0

    def __call__(self, model: Any, optimizer: Any, micro_batches: Any) -> Tensor:
        world = dist.get_world_size() if dist.is_initialized() else 1
        torch.manual_seed(self.steps * world + rank())
        self.steps += 1
        optimizer.zero_grad()
        for batch in micro_batches:
            (loss(model, batch) / len(micro_batches)).backward()
        optimizer.step()
        return torch.zeros(())


@healthy
def dropout_seeded_by_rank() -> TrainingCase:
    return case("dropout_seeded_by_rank", model=with_dropout, step=ReseedingStep())
