"""Does a gradient reach every trainable parameter? Runs the case's own step in one process.

A parameter that gets one only in some steps passes (mixture of experts, stochastic depth), and so does one
whose gradient is exactly zero (a zero-initialised projection in front of it). One that gets them in the first
steps only does not. Does not judge whether a gradient is right.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

from pytest_gputrain.case import TrainingCase
from pytest_gputrain.checks.context import CheckContext
from pytest_gputrain.checks.finite import parameters_are_finite
from pytest_gputrain.checks.ranks import alone
from pytest_gputrain.checks.registry import check
from pytest_gputrain.checks.result import CheckFailed, Figures
from pytest_gputrain.trace.digest import is_finite
from pytest_gputrain.trace.steps import AT_STEP, StepRecord

# The first HEAD steps show a gradient, the rest whether it keeps coming.
HEAD, STEPS = 3, 4
# Layers dropped with probability 1/2 are missed in all of 3 steps one time in 8, in 20 and more never.
PATIENT_STEPS = 24
PATIENCE_SECONDS = 60.0


@check("gradients_arrive", subject="gradient flow")
def check_gradients_arrive(case: TrainingCase, ctx: CheckContext) -> Figures:
    """Fails for a trainable parameter without a gradient in any step, and for NaN or Inf that is used."""
    figures: Figures = alone(_trace, case, ctx, doing="taking training steps in one process")
    return figures


@dataclass
class _Seen:
    """What was seen of each gradient, by name. broken: the first step with NaN or Inf in it.

    An optimizer that did not step with such a gradient did no harm: a loss scaler looks for them.
    """

    assigned: set[str] = field(default_factory=set)
    nonzero: set[str] = field(default_factory=set)
    broken: dict[str, int] = field(default_factory=dict)
    used_broken: dict[str, int] = field(default_factory=dict)
    updates: int = 0
    last: dict[str, int] = field(default_factory=dict)

    def look(self, record: StepRecord, step: int, arrived: set[str]) -> None:
        """arrived: names to whose gradient autograd added in this step."""
        self.updates += record.optimizer_steps
        self.last.update(dict.fromkeys(arrived, step))
        for moment, gradients in record.gradients.items():
            for name, gradient in gradients.items():
                if gradient is not None:
                    self._look_at(name, gradient, step, used=moment == AT_STEP)

    def _look_at(self, name: str, gradient: Any, step: int, *, used: bool) -> None:
        self.assigned.add(name)
        if not is_finite(gradient):
            self.broken.setdefault(name, step)
            if used:
                self.used_broken.setdefault(name, step)
        if bool((gradient != 0).any()):  # zeros may be left from zero_grad
            self.nonzero.add(name)
            self.last[name] = step

    def gone(self, trainable: list[str]) -> list[str]:
        """Those whose gradient came in the first steps and never since."""
        return [name for name in trainable if self.last.get(name, HEAD) < HEAD]

    @property
    def skipping(self) -> bool:
        """Whether a loss scaler may still be looking for its scale."""
        return bool(self.broken) and not self.updates

    @property
    def harmful(self) -> dict[str, int]:
        """By name, the first step with a gradient that is not finite and was not skipped."""
        return self.used_broken if self.updates else self.broken


def _trace(case: TrainingCase, ctx: CheckContext) -> Figures:
    """In the rank: steps until every gradient has arrived, and again after the first steps."""
    from pytest_gputrain.checks.session import build_alone, draw_batch, seed_for, take_step
    from pytest_gputrain.trace.gradients import GradTracer
    from pytest_gputrain.trace.names import named_parameters
    from pytest_gputrain.trace.steps import StepRecorder

    model = build_alone(case, ctx)
    tracer, seen = GradTracer(model), _Seen()
    if not tracer.trainable:
        raise CheckFailed(
            f"nothing trains: none of the model's {len(named_parameters(model))} parameters "
            "has requires_grad=True"
        )
    optimizer = case.optimizer(model)
    recorder = StepRecorder(named_parameters(model), optimizer)
    started, steps, backwards = time.monotonic(), 0, 0
    with tracer:
        while _go_on(steps, started, waiting=_waiting(tracer, seen)):
            batch = draw_batch(case, ctx, steps)
            with recorder.step() as record:
                take_step(case, model, optimizer, [batch], seed_for(ctx, steps))
            seen.look(record, steps, tracer.arrived)
            backwards += record.backwards
            tracer.step()
            parameters_are_finite(model, steps, seen.used_broken)
            steps += 1
    _judge(tracer, seen, steps, backwards)
    silent = [name for name in tracer.trainable if name not in seen.nonzero]
    notes = [f"always exactly zero: {', '.join(silent[:5])} ({len(silent)} in all)"] if silent else []
    return {"parameters": len(tracer.trainable), "steps": steps, "always_zero": silent, "notes": notes}


def _missing(tracer: Any, seen: _Seen) -> list[str]:
    return [name for name in tracer.missing_ever if name not in seen.assigned]


def _waiting(tracer: Any, seen: _Seen) -> bool:
    return seen.skipping or bool(_missing(tracer, seen) or seen.gone(tracer.trainable))


def _go_on(steps: int, started: float, *, waiting: bool) -> bool:
    if steps < STEPS:
        return True
    return waiting and steps < PATIENT_STEPS and time.monotonic() - started < PATIENCE_SECONDS


def _judge(tracer: Any, seen: _Seen, steps: int, backwards: int) -> None:
    from pytest_gputrain.trace.gradients import describe_missing, likely_cause

    trainable, missing = tracer.trainable, _missing(tracer, seen)
    total = len(trainable)
    if missing:
        cause = likely_cause(missing, trainable)
        if backwards == 0 and len(missing) == total:
            cause = "the step never calls backward()"
        raise CheckFailed(
            f"{len(missing)} of {total} trainable parameters got no gradient in {steps} steps: "
            f"{describe_missing(missing, tracer.owners)}\n  likely: {cause}",
            {"missing": missing, "parameters": total, "steps": steps},
        )
    if seen.harmful:
        first = min(seen.harmful.values())
        names = [name for name in trainable if name in seen.harmful]
        raise CheckFailed(
            f"{len(names)} of {total} trainable parameters got a NaN or infinite gradient, first in step "
            f"{first}: {describe_missing(names, tracer.owners)}",
            {"not_finite": names, "parameters": total, "steps": steps},
        )
    if steps > STEPS and (gone := seen.gone(trainable)):
        last = max(seen.last[name] for name in gone)
        raise CheckFailed(
            f"{len(gone)} of {total} trainable parameters get no gradient after step {last}, in {steps} "
            f"steps: {describe_missing(gone, tracer.owners)}\n"
            "  likely: their module is replaced while training, or its output detached from then on",
            {"gone": gone, "parameters": total, "steps": steps},
        )
    if not seen.nonzero:
        raise CheckFailed(
            f"every gradient is exactly zero in {steps} steps ({total} of {total} trainable parameters)\n"
            "  likely: the loss does not depend on the model's output (multiplied by zero, clamped, all "
            "targets ignored)",
            {"parameters": total, "steps": steps},
        )
