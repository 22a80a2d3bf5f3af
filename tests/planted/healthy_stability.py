"""Programs whose long runs look as if something grew, slowed down or did not learn, and that are well."""

from __future__ import annotations

import copy
import math
from collections import deque
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pytest_gputrain.case import TrainingCase
from tests.planted.broken_stability_growth import Kept, Loads, make_sample, open_file
from tests.planted.broken_stability_runs import Step
from tests.planted.plant import WIDTH, Net, case, draw, healthy_by, loss, rank

# Its own memory is most of what such a small model needs, and comes only after steps that no finder tries.
BATCH_SIZE = ("batch_size_found", "batch_size_holds")


class FillsUp(Step):
    """The last 120 outputs, and every loss as a number: the first stops, the second is 8 bytes a step."""

    def __init__(self) -> None:
        super().__init__()
        self.last: deque[Tensor] = deque(maxlen=120)
        self.losses: list[float] = []

    def take(self, model: Any, optimizer: Any, micro_batches: Any) -> Any:
        value = super().take(model, optimizer, micro_batches)
        self.last.append(torch.full((2048,), float(value)))
        self.losses.append(float(value))
        return value


@healthy_by(None, iterations=300, may_fail=BATCH_SIZE)
def memory_that_fills_up_and_stays() -> TrainingCase:
    return case("memory_that_fills_up_and_stays", step=FillsUp())


class Evaluates(Step):
    """Every 25 steps a large batch, whose outputs are kept until the next, and a copy of the weights."""

    def __init__(self) -> None:
        super().__init__()
        self.outputs: list[Tensor] = []
        self.best: Any = None

    def take(self, model: Any, optimizer: Any, micro_batches: Any) -> Any:
        value = super().take(model, optimizer, micro_batches)
        if self.steps % 25 == 0:
            self.outputs.clear()
            self.best = copy.deepcopy(model.state_dict())
        if self.steps % 25 < 10:
            with torch.no_grad():
                self.outputs.append(model(torch.zeros(64, WIDTH)))
        return value


@healthy_by(None, iterations=300, may_fail=BATCH_SIZE)
def memory_that_comes_and_goes() -> TrainingCase:
    return case("memory_that_comes_and_goes", step=Evaluates())


class Dropped(Net):
    """Half of the features at random."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(F.dropout(x, 0.5, self.training))


def noisy_batches() -> Iterator[Any]:
    """Hardly anything to learn: one target in ten follows the input."""
    direction = torch.linspace(-1, 1, WIDTH)
    for _ in range(60):
        batch = draw(4, "cpu")
        follows = torch.rand(4) < 0.1
        batch["y"] = torch.where(follows, (batch["x"] @ direction > 0).long(), batch["y"])
        yield batch


@healthy_by(None, iterations=300)
def noisy_loss() -> TrainingCase:
    return case("noisy_loss", model=Dropped, batches=noisy_batches)


def random_batches() -> Iterator[Any]:
    for _ in range(1000):
        yield draw(4, "cpu")


class AtChance(Net):
    """Begins at the loss of a guess, as language models whose head is zero do."""

    def __init__(self) -> None:
        super().__init__()
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)


@healthy_by(None, iterations=300)
def nothing_to_learn_in_the_stream() -> TrainingCase:
    return case("nothing_to_learn_in_the_stream", model=AtChance, batches=random_batches)


class WarmsUp(Step):
    """The rate rises over 150 steps and falls after them; clipped gradients; averaged weights."""

    def __init__(self) -> None:
        super().__init__()
        self.average: dict[str, Tensor] = {}

    def take(self, model: Any, optimizer: Any, micro_batches: Any) -> Any:
        rate = self.steps / 150 if self.steps < 150 else 0.5 * (1 + math.cos((self.steps - 150) / 150))
        for group in optimizer.param_groups:
            group["lr"] = 1e-3 * max(rate, 0.01)
        optimizer.zero_grad()
        value = loss(model, micro_batches[0])
        value.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        for name, parameter in model.named_parameters():
            kept = self.average.setdefault(name, parameter.detach().clone())
            kept.lerp_(parameter.detach(), 0.01)
        return value.detach()


@healthy_by(None, iterations=300)
def warm_up_clipping_and_averaged_weights() -> TrainingCase:
    return case("warm_up_clipping_and_averaged_weights", step=WarmsUp())


class Normalised(nn.Module):
    """Statistics differ between ranks, as they do without SyncBatchNorm and broadcast buffers."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.norm, self.down = nn.Linear(WIDTH, 32), nn.BatchNorm1d(32), nn.Linear(32, 4)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.down(F.relu(self.norm(self.up(x))))
        return out


def without_buffers(model: Any) -> Any:
    return nn.parallel.DistributedDataParallel(model, broadcast_buffers=False)


@healthy_by(None, iterations=300)
def statistics_of_each_rank() -> TrainingCase:
    return case("statistics_of_each_rank", model=Normalised, wrap=without_buffers)


class SkipsBadBatches(Step):
    """Some losses are no numbers, on all ranks in the same steps; the optimizer does not see them."""

    def take(self, model: Any, optimizer: Any, micro_batches: Any) -> Any:
        if self.steps % 60 == 50:
            return torch.tensor(float("nan"))
        return super().take(model, optimizer, micro_batches)


@healthy_by(None, iterations=300)
def bad_batches_that_are_skipped() -> TrainingCase:
    return case("bad_batches_that_are_skipped", step=SkipsBadBatches())


class RemembersBatches(Net):
    """Buffers that may differ: a codebook that follows the rank's batches, its number; a frozen teacher."""

    codes: Tensor
    teacher: nn.Linear

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("codes", torch.zeros(WIDTH))
        self.register_buffer("own", torch.tensor(float(rank())))
        self.register_buffer("last", torch.zeros(4), persistent=False)
        self.teacher = copy.deepcopy(self.head).requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.codes.lerp_(x.detach().mean(0), 0.1)
        out = super().forward(x + 0.01 * self.codes.clone())
        self.last = out.detach()[0].clone()
        taught: Tensor = self.teacher(x)
        return out + 0.1 * taught


class AveragesEverywhere(Step):
    def take(self, model: Any, optimizer: Any, micro_batches: Any) -> Any:
        done = super().take(model, optimizer, micro_batches)
        for own, average in zip(
            model.module.head.parameters(), model.module.teacher.parameters(), strict=True
        ):
            average.data.lerp_(own.data, 0.05)
        return done


@healthy_by(None, iterations=40)
def buffers_of_each_rank_and_a_teacher() -> TrainingCase:
    return case("buffers_of_each_rank_and_a_teacher", model=RemembersBatches, step=AveragesEverywhere())


@healthy_by(None, iterations=300)
def data_workers_whose_cache_fills_and_stops() -> TrainingCase:
    batches = Loads(Kept(make_sample, once=True, length=400), persistent=True)
    return case("data_workers_whose_cache_fills_and_stops", batches=batches)


@healthy_by(None, iterations=240)
def data_workers_started_anew_in_every_epoch() -> TrainingCase:
    """What they keep and open is gone with them."""
    data = Kept(lambda: (make_sample(), open_file()), length=160)
    return case("data_workers_started_anew_in_every_epoch", batches=Loads(data, persistent=False))
