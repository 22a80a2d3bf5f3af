"""Does compiled training compute what eager training computes? The same weights, data and random numbers.

First single steps: the gradients of every parameter, from the initial weights and from shaken ones (at a
zero-initialised projection a wrong layer looks like a right one), within what rounding does to them. Then 100
steps: the loss has to stay within 5 %, and what rounding does to eager training itself. Last, what the model
gives in evaluation. Compiled code is told to draw its random numbers as eager does; where it draws others all
the same, ``compile_chance`` judges.

Does not look at several ranks, nor at single activations.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from statistics import median
from typing import TYPE_CHECKING, Any

from pytest_gputrain.case import TrainingCase
from pytest_gputrain.checks.context import CheckContext
from pytest_gputrain.checks.ranks import alone
from pytest_gputrain.checks.registry import check
from pytest_gputrain.checks.result import CheckFailed, CheckSkipped, Figures
from pytest_gputrain.report.metrics import once

if TYPE_CHECKING:
    from pytest_gputrain.checks.compile_bounds import Wrong
    from pytest_gputrain.checks.compile_eager import Baseline
    from pytest_gputrain.checks.compile_sides import Side
    from pytest_gputrain.compile.monitor import CompileMonitor
    from pytest_gputrain.compile.trajectory import Parting

BATCHES = 8
LAST = 8  # steps of the final loss: each batch once


@check("compile_parity", subject="compile")
def check_compile_parity(case: TrainingCase, ctx: CheckContext) -> Figures:
    """Fails when compiled gradients or losses are not the eager ones, or when nothing compiled ran."""
    figures: Figures = alone(_compare, case, ctx, doing="training eager and compiled side by side")
    return figures


def _compare(case: TrainingCase, ctx: CheckContext) -> Figures:
    """In the rank. All eager work comes first: compiling may change classes, not only this model."""
    from pytest_gputrain.checks.compile_eager import watch_eager
    from pytest_gputrain.checks.compile_same import same_start
    from pytest_gputrain.checks.compile_sides import compiled
    from pytest_gputrain.checks.session import draw_batch

    _can_compile()
    batches = [draw_batch(case, ctx, step) for step in range(BATCHES)]
    baseline = watch_eager(case, ctx, batches)
    with _compiling(ctx) as monitor:
        side = compiled(case, ctx, baseline.start)
        notes = same_start(baseline, side)
        figures, same_draws = _judge_steps(case, ctx, baseline, side, batches[0], monitor, notes)
        curve = _judge_curve(case, ctx, baseline, side, batches, monitor, same_draws, notes)
        _judge_evaluation(ctx, baseline, side, batches[0], monitor, notes)
    return {**figures, **curve, "notes": notes}


def _can_compile() -> None:
    import os

    for name in ("TORCHDYNAMO_DISABLE", "TORCH_COMPILE_DISABLE"):
        if os.environ.get(name, "") not in ("", "0"):
            raise CheckSkipped(f"{name}={os.environ[name]} is set, so torch.compile does nothing; unset it")


@contextlib.contextmanager
def _compiling(ctx: CheckContext) -> Iterator[CompileMonitor]:
    """What the compiled side runs under."""
    from pytest_gputrain.checks.compile_context import backend_of
    from pytest_gputrain.compile.eager_random import eager_random_numbers
    from pytest_gputrain.compile.monitor import compile_monitor

    with backend_of(ctx), eager_random_numbers(), compile_monitor() as monitor:
        yield monitor


def _judge_steps(
    case: TrainingCase,
    ctx: CheckContext,
    baseline: Baseline,
    side: Side,
    batch: Any,
    monitor: CompileMonitor,
    notes: list[str],
) -> tuple[Figures, bool]:
    """Single steps. Returns the figures, and whether both sides draw the same random numbers."""
    from pytest_gputrain.checks.compile_eager import probes

    monitor.step(0, "single steps")
    got = probes(side, baseline.points, baseline.tries, batch, ctx)
    if not monitor.graph_runs:
        raise CheckFailed(*_nothing_compiled(monitor))
    figures = {"graphs": len(monitor.graphs), "precision": baseline.kind}
    for place, (bounds, probe) in enumerate(zip(baseline.bounds, got, strict=True)):
        wrong_loss, wrong = bounds.wrong_loss(probe), bounds.wrong_gradients(probe)
        wrong = wrong or bounds.wrong_buffers(probe)
        if not wrong_loss and not wrong:
            continue
        if baseline.random and (wrong_loss or probe.loss is None):
            return figures | _by_chance(ctx, baseline, side, batch, notes), False
        raise CheckFailed(*_in_words(baseline, side, place, wrong_loss, wrong))
    return figures | {"parameters": len(side.parameters)}, True


def _judge_evaluation(
    ctx: CheckContext, baseline: Baseline, side: Side, batch: Any, monitor: CompileMonitor, notes: list[str]
) -> None:
    """Without gradients the model has another graph. Last, because a loss may count its calls, and with the
    sides that are trained as far, because it may have weights of its own.
    """
    from pytest_gputrain.checks.compile_bounds import disturbed
    from pytest_gputrain.checks.compile_chance import compare_evaluation

    monitor.step(0, "evaluation")
    point = baseline.points[-1]
    near = disturbed(point, baseline.kind, ctx.seed)
    for one, at in zip([*baseline.trained, side], (point, near, point), strict=True):
        at.restore(one.bare)
    if note := compare_evaluation(baseline.trained, side, batch, ctx.seed, baseline.kind):
        notes.append(f"evaluation was not compared: {note}")


def _by_chance(ctx: CheckContext, baseline: Baseline, side: Side, batch: Any, notes: list[str]) -> Figures:
    """Where compiled draws other random numbers than eager."""
    from pytest_gputrain.checks.compile_chance import compare_draws, compare_quietly
    from pytest_gputrain.checks.compile_same import mode_in_words

    notes.append(
        "compiled draws other random numbers than eager: compared in evaluation mode and over many draws"
    )
    try:
        for point in baseline.points:
            for one in (baseline.side, baseline.other, side):
                point.restore(one.bare)
            if note := compare_quietly([baseline.side, baseline.other], side, batch, ctx.seed, baseline.kind):
                notes.append(note)
                break
        return compare_draws(baseline.side, side, baseline.points[1], batch, ctx.seed, baseline.kind)
    except CheckFailed as failure:
        mode = mode_in_words(baseline, side)
        raise CheckFailed(
            f"{failure.message}\n  {mode}" if mode else failure.message, failure.figures
        ) from None


def _nothing_compiled(monitor: CompileMonitor) -> tuple[str, Figures]:
    report = monitor.report()
    why = (
        "likely: compile() returns the model as it is, a decorator disables it, or the step calls the model "
        "that "
        "was there before"
    )
    if report.suppressed:
        why = f"{report.suppressed[0].message}   at {report.suppressed[0].location}"
    elif report.breaks:
        why = f"{report.breaks[0].reason}   at {report.breaks[0].location}"
    return (
        "nothing compiled: no compiled graph ran in the steps of the model that compile() returned, so it "
        "would "
        f"be eager against eager\n  {why}",
        {"graphs": len(report.graphs)},
    )


def _in_words(
    baseline: Baseline, side: Side, place: int, wrong_loss: Wrong | None, wrong: Sequence[Wrong]
) -> tuple[str, Figures]:
    from pytest_gputrain.checks.compile_same import mode_in_words
    from pytest_gputrain.trace.names import owners

    where = "in the first step" if place == 0 else "in a step from shaken weights"
    said = f"compiled differs from eager {where}: "
    if wrong:
        worst = wrong[0]
        owner = owners(side.bare).get(worst.name)
        of = f"{worst.name} ({owner})" if owner else worst.name
        what = "gradients" if owner else "buffers"
        said += (
            f"{len(wrong)} {what}, worst {of}, off by {worst.off:.2%} where rounding explains "
            f"{worst.allowed:.2%}"
        )
    if wrong_loss:
        said += f"{'; ' if wrong else ''}the loss is off by {wrong_loss.off:.2%}"
    elif wrong:
        said += "; the loss is the same"
    likely = mode_in_words(baseline, side) or (
        "likely: a backend, or an operation that it replaces, computes something else"
        if wrong_loss
        else "likely: a backward that is another under compile (autograd.Function, backend or operator)"
    )
    return f"{said}\n  {likely}", {"wrong": [one.name for one in wrong], "place": place}


def _judge_curve(
    case: TrainingCase,
    ctx: CheckContext,
    baseline: Baseline,
    side: Side,
    batches: Sequence[Any],
    monitor: CompileMonitor,
    same_draws: bool,
    notes: list[str],
) -> Figures:
    from pytest_gputrain.checks.compile_eager import STEPS, control, reseeded_curves, seeds_of
    from pytest_gputrain.checks.compile_report_data import keep_curves
    from pytest_gputrain.compile.trajectory import part

    number = len(baseline.curve)
    if not number:
        notes.append("the step returns no loss, so loss curves were not compared")
        return {}
    if number < STEPS:
        notes.append(f"{number} and not {STEPS} steps were compared: a step takes {baseline.seconds:.1f} s")
    losses = side.train(
        baseline.start, batches, seeds_of(ctx, number), lambda step: monitor.step(step, "train")
    )
    curve = [float("nan") if loss is None else loss for loss in losses]
    controls = list(baseline.controls)
    if not same_draws:
        controls += reseeded_curves(case, ctx, baseline, batches)
    parting = part(baseline.curve, curve, controls)
    if parting.at is not None:  # one control may have been lucky
        parting = part(baseline.curve, curve, [*controls, control(case, ctx, baseline, batches, 1)])
    seconds = {"eager": baseline.step_seconds, "compiled": side.step_seconds}
    keep_curves(case, ctx, baseline.curve, curve, seconds, batches[0], monitor.report())
    drawn: Figures = {"series": _curves({"eager": baseline.curve, "compiled": curve}, seconds)}
    if parting.at is not None:
        message, figures = _parted(parting, monitor)
        raise CheckFailed(message, figures | drawn)
    if parting.judged < number:
        notes.append(f"two eager runs part by themselves after {parting.judged} steps: compared until there")
    return {
        "steps": number,
        "loss off": parting.end,
        "worst": parting.worst,
        **drawn,
        "metrics": {"final_loss": once(median(curve[-LAST:]), unit="", better="lower")},
    }


def _curves(
    losses: Mapping[str, Sequence[float]], seconds: Mapping[str, Sequence[float]]
) -> list[dict[str, Any]]:
    """For the report: both sides' losses and step times."""
    from pytest_gputrain.report.series import series

    found = [series("loss", side, curve) for side, curve in losses.items()]
    return found + [series("step_seconds", side, times, unit="s") for side, times in seconds.items()]


def _parted(parting: Parting, monitor: CompileMonitor) -> tuple[str, Figures]:
    recompiles = [r for r in monitor.recompiles if r.step is not None and r.phase == "train"]
    near = f"; {len(recompiles)} recompiles, the first in step {recompiles[0].step}" if recompiles else ""
    return (
        f"compiled training leaves eager's loss in step {parting.at}: {parting.compiled:.4g}, not "
        f"{parting.eager:.4g}, {parting.worst:.1%} apart where {parting.allowed:.1%} are allowed{near}\n"
        "  likely: something that changes from step to step is fixed in the graph (a global, a schedule, a "
        "counter), or the optimizer holds other parameters than the compiled model",
        {"at": parting.at, "worst": parting.worst},
    )
