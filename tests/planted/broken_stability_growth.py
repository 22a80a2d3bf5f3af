"""Programs that train well and keep something of every step, or take longer with every step."""

from __future__ import annotations

import os
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from pytest_gputrain.case import TrainingCase
from pytest_gputrain.case.defaults import unwrapped
from tests.planted.broken_stability_runs import LOADS, Step
from tests.planted.plant import WIDTH, Net, broken, case, loss, rank

STEPS = 240
# What trips these checks too, as they look at memory over a few steps.
MEMORY = ("batch_size_holds", "batch_size_found", "gradients_arrive", "ddp_completes", "compile_speed")


class KeepsLosses(Step):
    """The loss itself, and so the graph of every step."""

    def __init__(self) -> None:
        super().__init__()
        self.history: list[Tensor] = []

    def take(self, model: Any, optimizer: Any, micro_batches: Any) -> Any:
        optimizer.zero_grad()
        value = loss(model, micro_batches[0])
        value.backward(retain_graph=True)
        optimizer.step()
        self.history.append(value)
        return value.detach()


@broken({"stable_training": "history"}, may_fail=MEMORY, iterations=STEPS)
def graph_of_every_loss_kept() -> TrainingCase:
    return case("graph_of_every_loss_kept", step=KeepsLosses())


class KeepsTensors(Step):
    """4 KiB a step, from a step on, on some ranks."""

    def __init__(self, start: int = 0, on_rank: int | None = None, every: int = 1) -> None:
        super().__init__()
        self.start, self.on_rank, self.every = start, on_rank, every
        self.kept: list[Tensor] = []

    def take(self, model: Any, optimizer: Any, micro_batches: Any) -> Any:
        here = self.on_rank is None or rank() == self.on_rank
        if here and self.steps > self.start and self.steps % self.every == 0:
            self.kept.append(torch.zeros(1024 * self.every))
        return super().take(model, optimizer, micro_batches)


@broken({"stable_training": "kept"}, may_fail=MEMORY, iterations=STEPS)
def four_kilobytes_a_step() -> TrainingCase:
    return case("four_kilobytes_a_step", step=KeepsTensors())


@broken({"stable_training": "rank 1"}, may_fail=MEMORY, iterations=STEPS)
def four_kilobytes_a_step_on_one_rank() -> TrainingCase:
    return case("four_kilobytes_a_step_on_one_rank", step=KeepsTensors(on_rank=1))


@broken({"stable_training": "kept"}, may_fail=MEMORY, iterations=STEPS)
def leak_that_begins_late() -> TrainingCase:
    return case("leak_that_begins_late", step=KeepsTensors(start=120))


@broken({"stable_training": "kept"}, may_fail=MEMORY, iterations=STEPS)
def leak_in_every_tenth_step() -> TrainingCase:
    return case("leak_in_every_tenth_step", step=KeepsTensors(every=10))


class Remembers(Net):
    """Its activations by step, for a picture that nobody draws."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: dict[int, Tensor] = {}

    def forward(self, x: Tensor) -> Tensor:
        out = super().forward(x)
        self.seen[len(self.seen)] = x.detach().clone()
        return out


@broken(
    {"stable_training": "seen"},
    may_fail=(*MEMORY, "compile_no_recompiles", "batch_shapes_constant"),
    iterations=STEPS,
)
def activations_kept_by_the_model() -> TrainingCase:
    return case("activations_kept_by_the_model", model=Remembers)


class Leaks(Step):
    """What is no tensor: made by ``make`` in every step, and kept."""

    def __init__(self, make: Callable[[], Any]) -> None:
        super().__init__()
        self.make = make
        self.kept: list[Any] = []

    def take(self, model: Any, optimizer: Any, micro_batches: Any) -> Any:
        self.kept.append(self.make())
        return super().take(model, optimizer, micro_batches)


def open_file() -> int:
    return os.open(os.devnull, os.O_RDONLY)


def start_thread() -> threading.Thread:
    thread = threading.Thread(target=threading.Event().wait, daemon=True)
    thread.start()
    return thread


def make_bytes() -> bytearray:
    return bytearray(256 * 1024)


@broken({"stable_training": "open files grow on every rank"}, iterations=STEPS)
def file_descriptor_leak() -> TrainingCase:
    return case("file_descriptor_leak", step=Leaks(open_file))


@broken({"stable_training": "threads grow on every rank"}, iterations=STEPS)
def thread_leak() -> TrainingCase:
    return case("thread_leak", step=Leaks(start_thread))


@broken({"stable_training": "host memory grows without end on every rank"}, may_fail=MEMORY, iterations=STEPS)
def bytes_kept_in_every_step() -> TrainingCase:
    return case("bytes_kept_in_every_step", step=Leaks(make_bytes))


class KeepsRecords(Step):
    """What was said of every sample, as text and numbers: too small for malloc to see."""

    def __init__(self) -> None:
        super().__init__()
        self.said: dict[tuple[int, int], tuple[str, float]] = {}

    def take(self, model: Any, optimizer: Any, micro_batches: Any) -> Any:
        value = super().take(model, optimizer, micro_batches)
        for sample in range(100):
            self.said[self.steps, sample] = (f"{self.steps}: {sample}", float(value) * sample)
        return value


@broken(
    {"stable_training": "Python objects grow without end on every rank"}, may_fail=MEMORY, iterations=STEPS
)
def records_of_every_sample() -> TrainingCase:
    return case("records_of_every_sample", step=KeepsRecords())


class Kept(Dataset[dict[str, Tensor]]):
    """``fill``: called in the worker for every sample, or once for each; what it returns is kept there."""

    def __init__(self, fill: Callable[[], Any], *, once: bool = False, length: int = 4000) -> None:
        self.fill, self.once, self.length = fill, once, length
        self.kept: list[Any] = []
        self.known: dict[int, Any] = {}

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        if not self.once:
            self.kept.append(self.fill())
        elif index not in self.known:
            self.known[index] = self.fill()
        made = torch.Generator().manual_seed(index)
        return {"x": torch.randn(WIDTH, generator=made), "y": torch.tensor(index % 4)}


class Loads:
    """Two workers; ``persistent`` or started anew in every epoch."""

    def __init__(self, data: Kept, *, persistent: bool) -> None:
        self.data, self.persistent = data, persistent
        self.loader: Any = None

    def __call__(self) -> Iterator[Any]:
        if self.loader is None:
            self.loader = DataLoader(
                self.data, batch_size=4, num_workers=2, persistent_workers=self.persistent
            )
        return iter(self.loader)


def make_sample() -> bytes:
    return b"x" * 98304


@broken({"stable_training": "memory of data loader worker "}, may_fail=LOADS, iterations=STEPS)
def data_worker_keeps_every_sample() -> TrainingCase:
    batches = Loads(Kept(make_sample), persistent=True)
    return case("data_worker_keeps_every_sample", batches=batches)


@broken({"stable_training": "open files of data loader worker "}, may_fail=LOADS, iterations=STEPS)
def data_worker_opens_a_file_for_each_sample() -> TrainingCase:
    batches = Loads(Kept(open_file), persistent=False)
    return case("data_worker_opens_a_file_for_each_sample", batches=batches)


class Starts(Step):
    """A process every four steps, which nobody ends."""

    def __init__(self) -> None:
        super().__init__()
        self.started: list[Any] = []

    def take(self, model: Any, optimizer: Any, micro_batches: Any) -> Any:
        if self.steps % 4 == 0:
            self.started.append(subprocess.Popen(["sleep", "600"]))
        return super().take(model, optimizer, micro_batches)


@broken({"stable_training": "has started grow"}, may_fail=MEMORY, iterations=STEPS)
def processes_that_nobody_ends() -> TrainingCase:
    return case("processes_that_nobody_ends", step=Starts())


class Hooks(Step):
    """Another hook on the head in every step: some hundred bytes, and all of them run."""

    def take(self, model: Any, optimizer: Any, micro_batches: Any) -> Any:
        unwrapped(model).head.register_forward_hook(lambda *_: None)
        return super().take(model, optimizer, micro_batches)


@broken(
    {"stable_training": "hooks on the model grow on every rank"},
    may_fail=(*MEMORY, "compile_no_recompiles"),
    iterations=STEPS,
)
def hook_registered_in_every_step() -> TrainingCase:
    return case("hook_registered_in_every_step", step=Hooks())


class Wide(nn.Module):
    """(batch, 16) -> (batch, 4), some milliseconds a step."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(WIDTH, 512)
        self.mid = nn.Linear(512, 512)
        self.down = nn.Linear(512, 4)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.down(torch.relu(self.mid(torch.relu(self.up(x)))))
        return out


class SlowsDown(Step):
    """From step 100 on every step is computed seven times, so that it takes about three times as long: the
    optimizer, DDP and the monitors take as long as before."""

    def take(self, model: Any, optimizer: Any, micro_batches: Any) -> Any:
        for _ in range(6 if self.steps > 100 else 0):
            loss(model, micro_batches[0]).backward()
            optimizer.zero_grad()
        return super().take(model, optimizer, micro_batches)


@broken(
    {"stable_training": "times as long from step"}, may_fail=("accumulation_schedule", "accumulation_parity")
)
def steps_that_get_slower() -> TrainingCase:
    return case("steps_that_get_slower", model=Wide, step=SlowsDown())


class Batched(nn.Module):
    """Buffers go from rank 0 to the others before each forward, so that ranks wait for each other there."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.norm, self.down = nn.Linear(WIDTH, 64), nn.BatchNorm1d(64), nn.Linear(64, 4)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.down(torch.relu(self.norm(self.up(x))))
        return out


class Dawdles(Step):
    """The first rank reads something in every step, from step ``since`` on."""

    def __init__(self, since: int) -> None:
        super().__init__()
        self.since = since

    def take(self, model: Any, optimizer: Any, micro_batches: Any) -> Any:
        if rank() == 0 and self.steps >= self.since:
            time.sleep(0.03)
        return super().take(model, optimizer, micro_batches)


# What trips the other checks: the model has BatchNorm.
NORMALISED = (
    "ddp_parity",
    "accumulation_parity",
    "accumulation_schedule",
    "batch_size_holds",
    "compile_parity",
)


@broken({"stable_training": "rank 0 keeps the others waiting, in "}, may_fail=NORMALISED, iterations=100)
def rank_that_is_waited_for_before_the_forward() -> TrainingCase:
    return case("rank_that_is_waited_for_before_the_forward", model=Batched, step=Dawdles(0))


@broken({"stable_training": "times as long on rank 0 from step "}, may_fail=NORMALISED, iterations=STEPS)
def rank_that_gets_slower_before_the_forward() -> TrainingCase:
    return case("rank_that_gets_slower_before_the_forward", model=Batched, step=Dawdles(120))
