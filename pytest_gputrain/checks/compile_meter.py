"""A loop's own way to measure its speed, tried on steps of which it is known how long they take.

A meter is ``meter(train_step, batches, *, evaluate, compiled, case, model, optimizer, device)``: it trains on
the batches by ``train_step(batch) -> loss``, calls ``evaluate()`` where its loop would, and returns a mapping
(or an object) with ``seconds_per_step``, ``tokens_per_second`` or both. It may leave out of its arguments
what it does not want. It is asked twice, for eager and for compiled, on the same batches.

On a CPU a lagging device stands in for a GPU: steps go on after they return, until somebody waits.
"""

from __future__ import annotations

import contextlib
import inspect
import time
from collections.abc import Callable, Mapping
from typing import Any

from pytest_gputrain.case import TrainingCase
from pytest_gputrain.case.loading import LazyCallable, describe
from pytest_gputrain.checks.batch_finders import name_of
from pytest_gputrain.checks.compile_context import backend_of
from pytest_gputrain.checks.compile_measure import batches_of
from pytest_gputrain.checks.compile_sides import Side, Snapshot, compiled, copied, eager
from pytest_gputrain.checks.context import CheckContext
from pytest_gputrain.checks.lagging import LaggingDevice
from pytest_gputrain.checks.result import CheckFailed, Figures
from pytest_gputrain.checks.session import device_of, seed_everything
from pytest_gputrain.compile.batch_tokens import BatchTokens, tokens_of
from pytest_gputrain.compile.claims import (
    UNSYNCHRONISED,
    Claim,
    Judgement,
    Seen,
    SeenStep,
    judge,
    same_tokens,
)
from pytest_gputrain.compile.monitor import compile_monitor

BATCHES = 24
# Long beside what the host does in between, short enough for two dozen steps.
LEAST_LAG, MOST_LAG, LAG = 0.01, 0.1, 3.0
EVALUATION_STEPS = 4
_WAITS = ("synchronize", "Event(", "do_bench")


class _Run:
    """One side under a meter, and the record of it. lag: seconds that the stand-in works after a step."""

    def __init__(self, side: Side, ctx: CheckContext, lag: float) -> None:
        self.side, self.ctx, self.lag = side, ctx, lag
        self.device: Any = LaggingDevice() if ctx.device == "cpu" else _Cuda()
        self._steps: list[tuple[float, float, Any, BatchTokens]] = []
        self._apart: list[tuple[float, float]] = []

    def train_step(self, batch: Any) -> Any:
        """One optimizer step, as the case does it."""
        count = tokens_of(batch, self.side.case.num_targets)
        started = time.perf_counter()
        with self.device.in_place(False), self.side.guard():
            loss = self.side.case.step(self.side.run, self.side.optimizer, [copied(batch)])
        done = self.device.work(self.lag)
        self._steps.append((started, time.perf_counter(), done, count))
        return self.device.late(loss)

    def evaluate(self, batch: Any) -> float:
        """Forward passes without gradients, and the last one's loss."""
        import torch

        self.device.wait()
        started, value = time.perf_counter(), 0.0
        for _ in range(EVALUATION_STEPS):
            with torch.no_grad(), self.device.in_place(False), self.side.guard():
                value = float(self.side.case.loss(self.side.run, copied(batch)))
            self.device.work(self.lag)
        self.device.wait()
        self._apart.append((started, time.perf_counter()))
        return value

    def seen(self) -> Seen:
        """The record, once the device is done."""
        self.device.wait()
        steps = [
            SeenStep(
                started, returned, self.device.moment(done), count.total,
                count.total if count.useful is None else count.useful,
            )
            for started, returned, done, count in self._steps
        ]  # fmt: skip
        return Seen(steps, self._apart)


class _Cuda:
    """The same for a GPU, which lags by itself."""

    def __init__(self) -> None:
        import torch

        self.wait()
        self._base, self._began = torch.cuda.Event(enable_timing=True), time.perf_counter()
        self._base.record()

    def work(self, seconds: float) -> Any:
        import torch

        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def moment(self, done: Any) -> float:
        return self._began + float(self._base.elapsed_time(done)) / 1e3

    def wait(self) -> None:
        import torch

        torch.cuda.synchronize()

    def late(self, value: Any) -> Any:
        return value

    def in_place(self, inside: bool = True) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()


def judge_meter(case: TrainingCase, ctx: CheckContext) -> Figures:
    """In a rank. Raises CheckFailed for a meter that is wrong about a side, or counts them unlike."""
    meter = LazyCallable(ctx.meter, "meter").resolve() if isinstance(ctx.meter, str) else ctx.meter
    batches = batches_of(case, ctx)
    batches = [batches[place % len(batches)] for place in range(BATCHES)]
    slow = eager(case, ctx)
    start = Snapshot.of(slow.bare)
    lag = _lag(slow, batches[0])
    found = {"eager": _ask(meter, _Run(slow, ctx, lag), batches, is_compiled=False)}
    with backend_of(ctx), compile_monitor():
        run = _Run(compiled(case, ctx, start), ctx, lag)
        found["compiled"] = _ask(meter, run, batches, is_compiled=True)
    for name, judgement in found.items():
        if judgement.problem:
            raise CheckFailed(f"{name_of(ctx.meter)} is wrong about {name}: {judgement.problem}")
    if problem := same_tokens(found["eager"], found["compiled"]):
        raise CheckFailed(f"{name_of(ctx.meter)}: {problem}")
    counts = found["compiled"].counts or "all"
    return {"meter": name_of(ctx.meter), "meter counts": counts}


def _ask(meter: Callable[..., Any], run: _Run, batches: list[Any], *, is_compiled: bool) -> Judgement:
    seed_everything(run.ctx.seed)
    question = {
        "evaluate": lambda: run.evaluate(batches[0]),
        "compiled": is_compiled,
        "case": run.side.case,
        "model": run.side.run,
        "optimizer": run.side.optimizer,
        "device": device_of(run.ctx),
    }
    try:
        with run.device.in_place():
            said = meter(run.train_step, batches, **_wanted(meter, question))
        judgement = judge(_claim(said), run.seen())
    except Exception as error:
        raise CheckFailed(f"{name_of(meter)} raised {describe(error)}") from error
    # Behind "if device is a GPU" it does nothing here.
    excused = run.ctx.device == "cpu" and UNSYNCHRONISED in (judgement.problem or "") and _may_wait(meter)
    return Judgement(None, judgement.counts) if excused else judgement


def _lag(side: Side, batch: Any) -> float:
    """Long beside the host's part of an eager step."""
    for _ in range(2):  # the first one pays for much that no other does
        began = time.perf_counter()
        with side.guard():
            side.case.step(side.run, side.optimizer, [copied(batch)])
    return min(MOST_LAG, max(LEAST_LAG, LAG * (time.perf_counter() - began)))


def _claim(said: Any) -> Claim:
    names = ("seconds_per_step", "tokens_per_second")
    values = [said.get(name) if isinstance(said, Mapping) else getattr(said, name, None) for name in names]
    seconds, tokens = (None if value is None else float(value) for value in values)
    return Claim(seconds, tokens)


def _wanted(meter: Callable[..., Any], question: dict[str, Any]) -> dict[str, Any]:
    parameters = inspect.signature(meter).parameters.values()
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        return question
    names = {parameter.name for parameter in parameters}
    return {name: value for name, value in question.items() if name in names}


def _may_wait(meter: Callable[..., Any]) -> bool:
    """Whether its source waits for a device somewhere."""
    try:
        return any(word in inspect.getsource(meter) for word in _WAITS)
    except (OSError, TypeError):
        return False
