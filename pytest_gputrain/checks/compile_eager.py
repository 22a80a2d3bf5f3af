"""What a case does eager, as often as is needed to know how far compiled code may be from it.

Single steps at two points (the initial weights and shaken ones), each also repeated, from weights moved by
less than their rounding, and with other random numbers; then loss curves, one plain and two such controls.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from pytest_gputrain.case import TrainingCase
from pytest_gputrain.checks.compile_bounds import Bounds, coarsest_type, disturbed
from pytest_gputrain.checks.compile_sides import Probe, Side, Snapshot, eager
from pytest_gputrain.checks.context import CheckContext
from pytest_gputrain.checks.result import CheckUndecided
from pytest_gputrain.checks.session import seed_everything, seed_for
from pytest_gputrain.trace.digest import is_finite

STEPS, FEWEST_STEPS = 100, 10
TRIES = 20  # a loss scale of 2**31 is halved to 2**11
# A curve each of eager, compiled and two controls; of a slow step they are shorter, and that is said.
SECONDS_A_CURVE = 15.0
DISTURBANCES = 2
_NOTHING = "there is nothing to compare with"
_OTHER = 7  # a rank's number that no seed of these steps has
# As in checkpointing_parity: layers that are alike, or zero, hide what is swapped or lost.
SHAKE, NEARLY_ZERO, SIZE_FOR_ZERO = 0.05, 1e-2, 0.4


@dataclass
class Baseline:
    """points: weights to step from. bounds: at each, around the plain step. random: whether another seed
    gives another step. kind: the coarsest type that it computes in. curve, controls: losses; step_seconds:
    the curve's; seconds: of a single step. tries: steps from each point until gradients are finite.
    trained: the sides of the curve and of the first control.
    """

    points: list[Snapshot]
    tries: list[int]
    bounds: list[Bounds]
    random: bool
    kind: str
    seconds: float
    curve: list[float]
    step_seconds: list[float]
    controls: list[list[float]]
    side: Side
    other: Side
    trained: list[Side]

    @property
    def start(self) -> Snapshot:
        return self.points[0]


def watch_eager(case: TrainingCase, ctx: CheckContext, batches: Sequence[Any]) -> Baseline:
    """Raises CheckUndecided where eager training gives NaN, nothing to compare, or another step each time."""
    first = eager(case, ctx)
    start = Snapshot.of(first.bare)
    points = [start, shaken(start, ctx)]
    kind = _kind(case, ctx, start, batches[0])
    began = time.monotonic()
    plain, tries = settled(first, points, batches[0], ctx)
    seconds = (time.monotonic() - began) / sum(tries)
    repeated = probes(eager(case, ctx, start), points, tries, batches[0], ctx)
    moved, sides = [], []
    for number in range(DISTURBANCES):
        sides.append(eager(case, ctx, start))
        near = [disturbed(point, kind, ctx.seed + number) for point in points]
        moved.append(probes(sides[-1], near, tries, batches[0], ctx))
    reseeded = probes(eager(case, ctx, start), points, tries, batches[0], ctx, rank=_OTHER)
    bounds = [
        Bounds(one, [repeated[place], *(each[place] for each in moved)], kind)
        for place, one in enumerate(plain)
    ]
    _comparable(plain, repeated, kind)
    random = any(b.wrong_loss(got) or b.wrong_gradients(got) for b, got in zip(bounds, reseeded, strict=True))
    seeds = _seeds(ctx, seconds)
    walked = _as_far(case, ctx, start, points, tries, batches[0])
    curve = _known(walked.train(start, batches, seeds, lambda step: None))
    broken = [step for step, loss in enumerate(curve) if not math.isfinite(loss)]
    if broken:
        raise CheckUndecided(
            f"eager training loses its loss in step {broken[0]} (NaN or infinite); {_NOTHING}"
        )
    baseline = Baseline(
        points,
        tries,
        bounds,
        random,
        kind,
        seconds,
        curve,
        walked.step_seconds,
        [],
        first,
        sides[0],
        [walked],
    )
    baseline.controls.append(control(case, ctx, baseline, batches, 0))
    return baseline


def settled(
    side: Side, points: Sequence[Snapshot], batch: Any, ctx: CheckContext
) -> tuple[list[Probe], list[int]]:
    """A step from each point, taken again while its gradients are not finite: a loss scale may begin too
    high, and is lowered by each such step. Returns how often each was taken, too.
    """
    found: list[Probe] = []
    tries: list[int] = []
    for place, point in enumerate(points):
        tries.append(0)
        finite = False
        while not finite and tries[-1] < TRIES:
            point.restore(side.bare)
            probe = side.probe(batch, seed_for(ctx, place))
            tries[-1] += 1
            finite = all(is_finite(gradient) for gradient in probe.given)
        found.append(probe)
    return found, tries


def probes(
    side: Side,
    points: Sequence[Snapshot],
    tries: Sequence[int],
    batch: Any,
    ctx: CheckContext,
    *,
    rank: int = 0,
) -> list[Probe]:
    """The last of so many steps from each point. rank: chooses other random numbers."""
    found = []
    for place, (point, number) in enumerate(zip(points, tries, strict=True)):
        for _ in range(number):
            point.restore(side.bare)
            probe = side.probe(batch, seed_for(ctx, place, rank))
        found.append(probe)
    return found


def control(
    case: TrainingCase, ctx: CheckContext, baseline: Baseline, batches: Sequence[Any], number: int
) -> list[float]:
    """The eager loss curve from weights moved by their rounding."""
    start = disturbed(baseline.start, baseline.kind, ctx.seed + number)
    losses, side = _curve(case, ctx, start, baseline, batches, seeds_of(ctx, len(baseline.curve)))
    if number == 0:
        baseline.trained.append(side)
    return losses


def reseeded_curves(
    case: TrainingCase, ctx: CheckContext, baseline: Baseline, batches: Sequence[Any]
) -> list[list[float]]:
    """Eager loss curves with other random numbers, where compiled draws others as well."""
    steps = range(len(baseline.curve))
    return [
        _curve(case, ctx, baseline.start, baseline, batches, [seed_for(ctx, step, rank) for step in steps])[0]
        for rank in (_OTHER, _OTHER + 1)
    ]


def seeds_of(ctx: CheckContext, number: int) -> list[int]:
    return [seed_for(ctx, step) for step in range(number)]


def _seeds(ctx: CheckContext, seconds: float) -> list[int]:
    return seeds_of(ctx, max(FEWEST_STEPS, min(STEPS, int(SECONDS_A_CURVE / max(seconds, 1e-6)))))


def _curve(
    case: TrainingCase,
    ctx: CheckContext,
    start: Snapshot,
    baseline: Baseline,
    batches: Sequence[Any],
    seeds: Sequence[int],
) -> tuple[list[float], Side]:
    side = _as_far(case, ctx, start, baseline.points, baseline.tries, batches[0])
    return _known(side.train(start, batches, seeds, lambda step: None)), side


def _as_far(
    case: TrainingCase,
    ctx: CheckContext,
    start: Snapshot,
    points: Sequence[Snapshot],
    tries: Sequence[int],
    batch: Any,
) -> Side:
    """A side that has taken the single steps, as the compiled one has before its curve: steps may count."""
    side = eager(case, ctx, start)
    probes(side, points, tries, batch, ctx)
    return side


def _known(losses: Sequence[float | None]) -> list[float]:
    """Empty where the step returns no loss."""
    return [loss for loss in losses if loss is not None]


def _kind(case: TrainingCase, ctx: CheckContext, start: Snapshot, batch: Any) -> str:
    try:
        side = eager(case, ctx, start)
        with coarsest_type() as found:
            side.probe(batch, seed_for(ctx, 0))
    except Exception:  # what cannot run under a dispatch mode is judged by its parameters
        kinds = [str(one.dtype).removeprefix("torch.") for one in start.parameters.values()]
        return next(
            (kind for kind in ("bfloat16", "float16", "float32", "float64") if kind in kinds), "float32"
        )
    return found[0]


def _comparable(plain: Sequence[Probe], repeated: Sequence[Probe], kind: str) -> None:
    for one, again in zip(plain, repeated, strict=True):
        if not one.given:
            raise CheckUndecided(f"the eager step leaves no gradient; {_NOTHING}")
        if not all(is_finite(gradient) for gradient in one.given):
            raise CheckUndecided(f"the eager step gives gradients that are NaN or infinite; {_NOTHING}")
        if wrong := Bounds(one, [], kind).wrong_gradients(again):
            raise CheckUndecided(
                f"the same eager step, batch and seed give gradients that differ by {wrong[0].off:.1%}; draw "
                "all "
                "randomness from torch's default generator, and keep what changes from step to step out of "
                "globals"
            )


def shaken(start: Snapshot, ctx: CheckContext) -> Snapshot:
    """Every weight moved a little, zeros as well."""
    seed_everything(seed_for(ctx, 0, rank=1))

    def moved(tensor: Any) -> Any:
        if not tensor.is_floating_point() or tensor.element_size() < 2:
            return tensor
        size = float(tensor.float().square().mean().sqrt())
        size = size if size > NEARLY_ZERO else SIZE_FOR_ZERO
        return tensor + torch.randn_like(tensor) * (SHAKE * size)

    return Snapshot(
        {name: moved(one) for name, one in start.parameters.items()}, start.buffers, start.attributes
    )
