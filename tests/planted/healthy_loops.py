"""Healthy steps and optimizers, as people write their loops."""

from __future__ import annotations

import copy
import io
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel as DDP

from pytest_gputrain.case import TrainingCase
from tests.planted.broken_averages import clipping_step
from tests.planted.broken_gradients import turn_on
from tests.planted.broken_hangs import find_unused
from tests.planted.healthy_models import with_dropout
from tests.planted.plant import Net, case, healthy, healthy_but, loss


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


@healthy_but("compile_no_recompiles")  # its step wants the class itself
def step_that_looks_at_the_model() -> TrainingCase:
    return case("step_that_looks_at_the_model", step=isinstance_step)


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

    loss = staticmethod(loss)

    def __init__(self, init_scale: float = 1024.0, *, clip: bool = True) -> None:
        self.init_scale, self.clip = init_scale, clip
        self.scaler: Any = None

    def __call__(self, model: Any, optimizer: Any, micro_batches: Any) -> Tensor:
        self.scaler = self.scaler or torch.amp.GradScaler("cpu", init_scale=self.init_scale)
        optimizer.zero_grad()
        value = self.loss(model, micro_batches[0])
        self.scaler.scale(value).backward()
        if self.clip:
            self.scaler.unscale_(optimizer)
            torch.nn.utils.clip_grad_norm_(model.parameters(), 0.05)
        self.scaler.step(optimizer)
        self.scaler.update()
        return value.detach()


@healthy
def loss_scaler() -> TrainingCase:
    return case("loss_scaler", step=ScaledStep())


def float16_loss(model: Any, batch: Any) -> Tensor:
    with torch.autocast(batch["x"].device.type, torch.float16):
        out = model(batch["x"])
    return F.cross_entropy(out.float(), batch["y"])


class OverflowingStep(ScaledStep):
    """In float16, with a scale that overflows in the first steps; the scaler skips those."""

    loss = staticmethod(float16_loss)


@healthy
def loss_scaler_that_overflows_first() -> TrainingCase:
    return case("loss_scaler_that_overflows_first", loss=float16_loss, step=OverflowingStep(2.0**19))


def fused(model: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)


@healthy
def loss_scaler_with_fused_optimizer() -> TrainingCase:
    step = OverflowingStep(2.0**19, clip=False)
    return case("loss_scaler_with_fused_optimizer", loss=float16_loss, step=step, optimizer=fused)


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


class SnapshotStep:
    """Keeps a moving average of the model, saves the model whole, and is particular about its class."""

    def __init__(self) -> None:
        self.average: Any = None

    def __call__(self, model: Any, optimizer: Any, micro_batches: Any) -> Tensor:
        inner = model.module if isinstance(model, DDP) else model
        assert type(inner) is Net
        self.average = self.average or copy.deepcopy(inner)
        optimizer.zero_grad()
        value = loss(model, micro_batches[0])
        value.backward()
        optimizer.step()
        torch.save(inner, io.BytesIO())
        copy.deepcopy(model)
        with torch.no_grad():
            for mean, parameter in zip(self.average.parameters(), inner.parameters(), strict=True):
                mean.lerp_(parameter, 0.1)
        return value.detach()


@healthy_but("compile_no_recompiles")  # its step wants the class itself
def model_copied_and_saved() -> TrainingCase:
    return case("model_copied_and_saved", step=SnapshotStep())
