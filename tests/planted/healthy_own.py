"""Healthy programs that look suspicious to a simple check, made of the tiny network."""

from __future__ import annotations

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
from tests.planted.broken_data import dataset
from tests.planted.broken_gradients import CheckpointedNet, turn_on
from tests.planted.broken_parallel import (
    ByHand,
    by_hand_step,
    clipping_step,
    find_unused,
    margin_case,
    num_targets,
    ragged_draw,
    static,
    token_loss,
)
from tests.planted.plant import WIDTH, Block, Net, case, healthy, loss


@healthy
def plain() -> TrainingCase:
    return case("plain")


def with_dropout() -> nn.Module:
    return CheckpointedNet(dropout=0.3)


@healthy
def dropout_with_checkpointing() -> TrainingCase:
    return case("dropout_with_checkpointing", model=with_dropout, set_checkpointing=turn_on)


class CheckpointsInTraining(CheckpointedNet):
    def run(self, block: nn.Module, x: Tensor) -> Tensor:
        if self.training:
            return super().run(block, x)
        out: Tensor = block(x)
        return out


def as_loaded() -> nn.Module:
    """from_pretrained gives models in eval mode."""
    return CheckpointsInTraining().eval()


@healthy
def model_given_in_eval_mode() -> TrainingCase:
    return case("model_given_in_eval_mode", model=as_loaded, set_checkpointing=turn_on)


def convnet() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1, bias=True),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 4),
    )


def image_draw(batch_size: int, device: Any) -> Any:
    return [torch.randn(batch_size, 1, 8, 8).to(device), torch.randint(4, (batch_size,)).to(device)]


def image_loss(model: Any, batch: Any) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


@healthy
def batchnorm_convnet() -> TrainingCase:
    return case("batchnorm_convnet", model=convnet, batch=image_draw, loss=image_loss)


class Experts(nn.Module):
    """A router that sends each sample to one of eight experts."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(WIDTH, 8)
        self.experts = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(8))
        self.head = nn.Linear(WIDTH, 4)

    def forward(self, x: Tensor) -> Tensor:
        chance, chosen = self.router(x).softmax(-1).max(-1)
        out = torch.zeros_like(x)
        for index, expert in enumerate(self.experts):
            rows = chosen == index
            if rows.any():
                out[rows] = expert(x[rows]) * chance[rows, None]
        result: Tensor = self.head(x + out)
        return result


@healthy
def mixture_of_experts() -> TrainingCase:
    return case("mixture_of_experts", model=Experts, wrap=find_unused)


class DropsBlocks(Net):
    def __init__(self) -> None:
        super().__init__(3)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            if not self.training or torch.rand(()) > 0.5:
                x = block(x)
        out: Tensor = self.head(x)
        return out


@healthy
def stochastic_depth() -> TrainingCase:
    return case("stochastic_depth", model=DropsBlocks, wrap=find_unused)


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(32, WIDTH)
        self.block = Block()
        self.head = nn.Linear(WIDTH, 32, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        out: Tensor = self.head(self.block(self.embedding(tokens)))
        return out


def token_draw(batch_size: int, device: Any) -> Any:
    tokens = torch.randint(32, (batch_size, 9)).to(device)
    return tokens[:, :-1], tokens[:, 1:]


def next_token_loss(model: Any, batch: Any) -> Tensor:
    return F.cross_entropy(model(batch[0]).flatten(0, 1), batch[1].flatten())


@healthy
def tied_weights() -> TrainingCase:
    return case("tied_weights", model=Tied, batch=token_draw, loss=next_token_loss)


def half() -> nn.Module:
    return Net().to(torch.bfloat16)


def half_loss(model: Any, batch: Any) -> Tensor:
    return F.cross_entropy(model(batch["x"].bfloat16()).float(), batch["y"])


@healthy
def bfloat16() -> TrainingCase:
    return case("bfloat16", model=half, loss=half_loss)


def autocast_loss(model: Any, batch: Any) -> Tensor:
    with torch.autocast(batch["x"].device.type, torch.bfloat16):
        return loss(model, batch)


@healthy
def autocast() -> TrainingCase:
    return case("autocast", model=with_dropout, loss=autocast_loss, set_checkpointing=turn_on)


@healthy
def clipping_and_accumulation() -> TrainingCase:
    return case("clipping_and_accumulation", step=clipping_step)


class ScheduledStep:
    """Warm-up from zero, clipping by hand, accumulation: a loop as people write it."""

    def __init__(self) -> None:
        self.schedule: Any = None

    def __call__(self, model: Any, optimizer: Any, micro_batches: Any) -> Any:
        if self.schedule is None or self.schedule.optimizer is not optimizer:
            self.schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, step / 3))
        optimizer.zero_grad()
        total = 0.0
        for index, batch in enumerate(micro_batches):
            model.require_backward_grad_sync = index == len(micro_batches) - 1
            value = loss(model, batch) / len(micro_batches)
            value.backward()
            total += value.item()
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        norm = torch.stack([g.norm() for g in gradients]).norm()
        for gradient in gradients:
            gradient.mul_((0.01 / (norm + 1e-6)).clamp(max=1.0))
        optimizer.step()
        self.schedule.step()
        return total


@healthy
def scheduler_and_clipping_by_hand() -> TrainingCase:
    return case("scheduler_and_clipping_by_hand", step=ScheduledStep())


@healthy
def manual_all_reduce() -> TrainingCase:
    return case("manual_all_reduce", wrap=ByHand, step=by_hand_step)


@healthy
def static_graph() -> TrainingCase:
    return case("static_graph", model=CheckpointedNet, wrap=static, set_checkpointing=turn_on)


class Adapter(nn.Module):
    """A low-rank adapter beside a frozen layer; its second half starts at zero."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.layer = layer.requires_grad_(False)
        self.down = nn.Linear(layer.in_features, 2, bias=False)
        self.up = nn.Linear(2, layer.out_features, bias=False)
        nn.init.zeros_(self.up.weight)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.layer(x) + self.up(self.down(x))
        return out


def adapted() -> nn.Module:
    model = Net().requires_grad_(False)
    for block in model.blocks:
        assert isinstance(block, Block)
        block.up = Adapter(block.up)  # type: ignore[assignment]
    return model


@healthy
def frozen_backbone_with_adapters() -> TrainingCase:
    return case("frozen_backbone_with_adapters", model=adapted)


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
    value = torch.zeros(())
    for index, batch in enumerate(micro_batches):
        model.require_backward_grad_sync = index == len(micro_batches) - 1
        value = sum_loss(model, batch) * dist.get_world_size()
        value.backward()
    torch.nn.utils.clip_grad_value_(model.parameters(), 0.05)
    optimizer.step()
    return value.detach()


@healthy
def summed_loss_with_clipping() -> TrainingCase:
    return case("summed_loss_with_clipping", loss=sum_loss, loss_reduction="sum", step=summed_clipping_step)


def summed_step(model: Any, optimizer: Any, micro_batches: Any) -> Tensor:
    optimizer.zero_grad()
    value = torch.zeros(())
    for batch in micro_batches:
        value = sum_loss(model, batch)
        value.backward()
    optimizer.step()
    return value.detach()


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


class ManyOptimizers:
    """As nanochat does: one for matrices, one for the rest."""

    def __init__(self, model: Any) -> None:
        matrices = [p for p in model.parameters() if p.ndim == 2]
        rest = [p for p in model.parameters() if p.ndim != 2]
        self.optimizers = [torch.optim.SGD(matrices, lr=0.05, momentum=0.9), torch.optim.AdamW(rest, lr=1e-3)]

    def zero_grad(self, set_to_none: bool = True) -> None:
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=set_to_none)

    def step(self) -> None:
        for optimizer in self.optimizers:
            optimizer.step()


@healthy
def several_optimizers() -> TrainingCase:
    return case("several_optimizers", optimizer=ManyOptimizers)


class Adversaries(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.generator, self.critic = Net(), nn.Linear(4, 1)

    def forward(self, x: Tensor, part: str) -> Tensor:
        made = self.generator(x)
        out: Tensor = self.critic(made.detach() if part == "critic" else made)
        return out


def adversaries(model: Any) -> list[Any]:
    return [
        torch.optim.SGD(model.critic.parameters(), lr=0.5),
        torch.optim.Adam(model.generator.parameters(), lr=1e-2),
    ]


def adversarial_step(model: Any, optimizers: Any, micro_batches: Any) -> Tensor:
    x = torch.cat([batch["x"] for batch in micro_batches])
    value = torch.zeros(())
    for optimizer, part, sign in zip(optimizers, ("critic", "generator"), (1.0, -1.0), strict=True):
        for each in optimizers:
            each.zero_grad()
        value = sign * F.softplus(model(x, part)).mean()
        value.backward()
        optimizer.step()
    return value.detach()


@healthy
def adversarial() -> TrainingCase:
    return case(
        "adversarial", model=Adversaries, optimizer=adversaries, step=adversarial_step, wrap=find_unused
    )


def sharded_batches() -> Iterator[Any]:
    rank, world = dist.get_rank(), dist.get_world_size()
    sampler: Any = DistributedSampler(dataset(), num_replicas=world, rank=rank, shuffle=True)
    for x, y in DataLoader(dataset(), batch_size=4, sampler=sampler):
        yield {"x": x, "y": y, "mask": torch.ones(4, 16)}


@healthy
def distributed_sampler() -> TrainingCase:
    return case("distributed_sampler", batches=sharded_batches)


def isinstance_step(model: Any, optimizer: Any, micro_batches: Any) -> Tensor:
    """Speaks to the bare model as loops do, wrapped or not."""
    inner = model.module if isinstance(model, DDP) else model
    assert isinstance(inner, Net)
    optimizer.zero_grad()
    with model.no_sync():
        loss(model, micro_batches[0]).backward()
    value = loss(model, micro_batches[0])
    value.backward()
    optimizer.step()
    return value.detach()


@healthy
def step_that_looks_at_the_model() -> TrainingCase:
    return case("step_that_looks_at_the_model", step=isinstance_step)


@healthy
def loss_weights_averaged_by_hand() -> TrainingCase:
    return margin_case("loss_weights_averaged_by_hand", reduce=True)


def closure_step(model: Any, optimizer: Any, micro_batches: Any) -> Tensor:
    """As Lightning does: the optimizer calls back for the gradients."""

    def closure() -> Tensor:
        optimizer.zero_grad()
        value = loss(model, micro_batches[0])
        value.backward()
        return value

    value: Tensor = optimizer.step(closure)
    return value.detach()


@healthy
def closure_in_the_optimizer() -> TrainingCase:
    return case("closure_in_the_optimizer", step=closure_step)


def quasi_newton(model: Any) -> torch.optim.Optimizer:
    return torch.optim.LBFGS(model.parameters(), lr=0.1, max_iter=3)


@healthy
def quasi_newton_optimizer() -> TrainingCase:
    return case("quasi_newton_optimizer", optimizer=quasi_newton, step=closure_step)


class ScaledStep:
    """A loss scaler, whose gradients are unscaled, then clipped, between backward and the optimizer."""

    def __init__(self) -> None:
        self.scaler: Any = None

    def __call__(self, model: Any, optimizer: Any, micro_batches: Any) -> Tensor:
        self.scaler = self.scaler or torch.amp.GradScaler("cpu", init_scale=1024.0)
        optimizer.zero_grad()
        value = loss(model, micro_batches[0])
        self.scaler.scale(value).backward()
        self.scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.05)
        self.scaler.step(optimizer)
        self.scaler.update()
        return value.detach()


@healthy
def loss_scaler() -> TrainingCase:
    return case("loss_scaler", step=ScaledStep())


class SparseTokens(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(32, WIDTH, sparse=True)
        self.head = nn.Linear(WIDTH, 32)

    def forward(self, tokens: Tensor) -> Tensor:
        out: Tensor = self.head(self.embedding(tokens))
        return out


def sparse_sgd(model: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.1)


@healthy
def sparse_gradients() -> TrainingCase:
    return case(
        "sparse_gradients", model=SparseTokens, batch=token_draw, loss=next_token_loss, optimizer=sparse_sgd
    )


class Student(nn.Module):
    """With a frozen teacher that follows it, and a count that forward keeps."""

    seen: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.student, self.teacher = Net(), Net().requires_grad_(False)
        self.teacher.load_state_dict(self.student.state_dict())
        self.register_buffer("seen", torch.zeros((), dtype=torch.long))

    def forward(self, x: Tensor) -> Tensor:
        self.seen += len(x)
        with torch.no_grad():
            target = self.teacher(x)
        difference: Tensor = self.student(x + 0.1) - target
        return difference

    def follow(self) -> None:
        for mine, theirs in zip(self.teacher.parameters(), self.student.parameters(), strict=True):
            mine.data.lerp_(theirs.data, 0.1)


def student_step(model: Any, optimizer: Any, micro_batches: Any) -> Tensor:
    optimizer.zero_grad()
    value: Tensor = model(micro_batches[0]["x"]).square().mean()
    value.backward()
    optimizer.step()
    model.module.follow()
    return value.detach()


@healthy
def teacher_that_follows() -> TrainingCase:
    return case("teacher_that_follows", model=Student, step=student_step)


class RunningCentre(Net):
    """Trains on what its buffer says, which differs by rank unless the wrapper sends it around."""

    centre: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("centre", torch.zeros(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        out = super().forward(x - self.centre)
        self.centre.lerp_(x.detach().mean(0), 0.5)
        return out


@healthy
def buffer_that_forward_reads_and_writes() -> TrainingCase:
    return case("buffer_that_forward_reads_and_writes", model=RunningCentre)


def own_buffers(model: Any) -> nn.Module:
    return DDP(model, broadcast_buffers=False, gradient_as_bucket_view=True)


@healthy
def buffer_of_each_rank() -> TrainingCase:
    return case("buffer_of_each_rank", model=RunningCentre, wrap=own_buffers)


class Spectrum(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.filter = nn.Parameter(torch.randn(WIDTH // 2 + 1, dtype=torch.complex64) * 0.1 + 1)
        self.head = nn.Linear(WIDTH, 4)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(torch.fft.irfft(torch.fft.rfft(x) * self.filter, n=WIDTH))
        return out


@healthy
def complex_parameters() -> TrainingCase:
    return case("complex_parameters", model=Spectrum)


class Adversary(Net):
    """Recurrent, with a weight norm, a buffer that forward makes, and a print: all of it legitimate."""

    def __init__(self) -> None:
        super().__init__()
        self.recurrent = nn.GRU(WIDTH, WIDTH, batch_first=True)
        self.head = torch.nn.utils.parametrizations.weight_norm(self.head)

    def forward(self, x: Tensor) -> Tensor:
        self.register_buffer("last", x.detach().mean(), persistent=False)
        print("forward", tuple(x.shape))
        out, _ = self.recurrent(x[:, None].expand(-1, 3, -1))
        return super().forward(x + out[:, -1])


@healthy
def recurrent_and_talkative() -> TrainingCase:
    return case("recurrent_and_talkative", model=Adversary)
