"""The loop of the training script: accumulate, clip, step, schedule; evaluate in between; count and time."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import nn

from pytest_gputrain.case.defaults import unwrapped
from pytest_gputrain.compile.validation import Validation
from pytest_gputrain.reference.sft_data import filled
from pytest_gputrain.reference.train_data import EVALUATION
from pytest_gputrain.reference.train_length import Length
from pytest_gputrain.reference.train_options import Options
from pytest_gputrain.reference.train_ranks import Ranks

FLOOR = 0.1  # of the highest learning rate, where the cosine ends


class Source(Protocol):
    """Where batches come from: samples ``first`` and on, ``count`` of them, of a step."""

    def batch(self, step: int, first: int, count: int, device: torch.device | str) -> Any: ...


@dataclass
class Course:
    """What a run came to. Times in seconds; `step_seconds` is one number a step, evaluation left out.

    rates: of the first parameter group, by step.
    """

    losses: list[float] = field(default_factory=list)
    rates: list[float] = field(default_factory=list)
    step_seconds: list[float] = field(default_factory=list)
    evaluation_seconds: float = 0.0
    eval_loss: float | None = None


@dataclass(frozen=True, kw_only=True)
class Loop:
    """A run about to begin. length: steps, and the sizes of their micro-batches.

    rates: the highest learning rate of each parameter group. first_step: how many steps the checkpoint had
    seen, so that samples are not seen again. num_rows: to which a short micro-batch is filled up.
    validation: told each step, which is all that there is of it in a loop.
    """

    options: Options
    ranks: Ranks
    source: Source
    loss: Callable[[Any, Any], Any]
    step: Callable[[Any, Any, list[Any]], Any]
    length: Length
    rates: tuple[float, ...]
    device_batch_size: int
    validation: Validation
    num_rows: int | None = None
    first_step: int = 0

    def run(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> Course:
        """Train all steps; ``model`` is data parallel where there are several ranks."""
        course, options, steps = Course(), self.options, self.length.steps
        model.train()
        for number in range(1, steps + 1):
            loss, lr, seconds = self._train(number, model, optimizer)
            course.losses.append(loss)
            course.rates.append(lr)
            course.step_seconds.append(seconds)
            speed = self.length.tokens_of(number) / seconds
            self.ranks.say(f"step {number}/{steps} | loss {loss:.6f} | lr {lr:.3e} | {speed:,.0f} tokens/s")
            if number == steps or (options.eval_every and number % options.eval_every == 0):
                self._evaluate(number, model, course)
        return course

    def _train(
        self, number: int, model: nn.Module, optimizer: torch.optim.Optimizer
    ) -> tuple[float, float, float]:
        """One step: (loss of the whole batch, learning rate, seconds)."""
        started = self.ranks.clock()
        share_of_rate = schedule(number, self.length.steps, self.options.warmup_steps)
        # Set and not scaled: a checkpoint's optimizer brings its own rate, which is not this run's.
        for group, rate in zip(optimizer.param_groups, self.rates, strict=True):
            group["lr"] = rate * share_of_rate
        batches = self._batches(number)
        with self.validation.step(batches):
            share = float(self.step(model, optimizer, batches))
        loss = self.ranks.mean(share)
        return loss, self.rates[0] * share_of_rate, self.ranks.clock() - started

    def _batches(self, number: int) -> list[Any]:
        plan, batches = self.length.plan_of(number), []
        first = self.ranks.rank * plan.samples_per_rank
        for count in plan.micro_batches():
            batch = self.source.batch(self.first_step + number - 1, first, count, self.ranks.device)
            batches.append(filled(batch, self.num_rows) if self.num_rows else batch)
            first += count
        return batches

    @torch.no_grad()
    def _evaluate(self, number: int, model: nn.Module, course: Course) -> None:
        """Mean loss over batches that no step trains on, all ranks, at evaluation's own batch size."""
        started = self.ranks.clock()
        # Not through DDP, which would broadcast buffers for nothing, nor compiled: evaluation's batches have
        # shapes of their own.
        bare = unwrapped(model).eval()
        samples = self._eval_samples()
        share, first = 0.0, self.ranks.rank * sum(samples)
        for count in samples:
            batch = self.source.batch(EVALUATION, first, count, self.ranks.device)
            share += float(self.loss(bare, batch)) * count / sum(samples)
            first += count
        course.eval_loss = self.ranks.mean(share)
        model.train()
        seconds = self.ranks.clock() - started
        course.evaluation_seconds += seconds
        self.ranks.say(f"eval at step {number} | loss {course.eval_loss:.6f} | {seconds:.2f} s")

    def _eval_samples(self) -> list[int]:
        """Sizes of a rank's batches in evaluation."""
        size = self.device_batch_size * self.options.eval_batch_factor
        if self.options.eval_samples is None:
            return [size] * self.options.eval_batches
        mine = max(1, self.options.eval_samples // self.ranks.world_size)
        return [min(size, mine - done) for done in range(0, mine, size)]


def schedule(number: int, steps: int, warmup: int | None = None) -> float:
    """Share of the highest learning rate at step ``number`` (from 1): linear up, then a cosine down to 0.1.

    warmup: steps; None is a tenth of all.
    """
    warmup = max(1, steps // 10) if warmup is None else warmup
    if number <= warmup:
        return number / warmup
    done = (number - warmup) / max(1, steps - warmup)
    return FLOOR + (1 - FLOOR) * (1 + math.cos(math.pi * done)) / 2
