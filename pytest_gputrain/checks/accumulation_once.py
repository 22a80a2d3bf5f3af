"""The part of ``accumulation_schedule`` in one process: the same windows whole and in pieces."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence
from typing import Any

from pytest_gputrain.case import TrainingCase
from pytest_gputrain.case.loading import describe
from pytest_gputrain.checks.accumulation_lab import HUGE, TINY, Lab
from pytest_gputrain.checks.accumulation_plan import Plan, Trial, plan, shares
from pytest_gputrain.checks.accumulation_runs import best_lab, run_window
from pytest_gputrain.checks.accumulation_sums import Tolerance, gap, weights_in
from pytest_gputrain.checks.accumulation_window import Window
from pytest_gputrain.checks.accumulation_words import ROUNDINGS, UNEXPLAINED, missing_words, why_steps
from pytest_gputrain.checks.context import CheckContext
from pytest_gputrain.checks.result import CheckFailed, Figures

# A schedule that acts in the second window shows what counts micro-batches; one more, to be sure.
WINDOWS = 3
NOTHING, TWICE = 0.02, 1.9
CLOSE = 1e-5


def judge_once(case: TrainingCase, ctx: CheckContext) -> Figures:
    """In a rank of its own. Raises CheckFailed with what happens more or less often than once a window."""
    lab = best_lab(case, ctx)
    chosen = plan(case, lab, ctx.batch_size)
    trial = chosen.trials[0]
    whole, pieces = _run(case, lab, chosen, trial.num)
    _judge_counts(whole, pieces, trial.num)
    _judge_settings(whole, pieces, trial.num)
    _judge_left(whole, pieces)
    ragged = [each for each in chosen.trials if not each.is_split]
    remarks = [_judge_parts(case, lab, each) for each in (trial, *ragged)]
    # The same is wrong with both windows' losses, if anything is, with other figures.
    notes = [remark for remark in remarks if remark][:1]
    _judge_clipping(case, ctx, lab, chosen, trial)
    return {
        "micro-batches": trial.num,
        "optimizer steps": sum(window.most_steps for window in pieces),
        "scheduler steps": sum(window.scheduler_steps for window in pieces),
        "clippings": sum(window.clips for window in pieces),
        "notes": notes,
    }


def _run(case: TrainingCase, lab: Lab, chosen: Plan, num: int) -> tuple[list[Window], list[Window]]:
    """The same data, a window in one piece and in ``num``."""
    batches = [lab.batch(chosen.requested, draw) for draw in range(WINDOWS)]
    split = [list(case.split(batch, num)) for batch in batches]
    run_window(lab, split[0], 1.0)  # tells a step that does not accumulate
    whole = lab.windows([[batch] for batch in batches])
    try:
        return whole, lab.windows(split)
    except Exception as error:
        raise CheckFailed(
            f"the step raises in windows of {num} micro-batches, and not in windows of one: {describe(error)}"
        ) from None


def _judge_counts(whole: Sequence[Window], pieces: Sequence[Window], num: int) -> None:
    once, many = (sum(window.most_steps for window in windows) for windows in (whole, pieces))
    if once and not many:
        raise CheckFailed(
            f"the optimizer does not step in {len(pieces)} windows of {num} micro-batches; with one it does"
        )
    if many >= 2 * max(once, 1):
        raise CheckFailed(
            f"the optimizer steps {_times(many, pieces)} in a window of {num} micro-batches, and "
            f"{_times(once, whole)} in one of a single micro-batch\n  likely: {why_steps(once / len(whole))}"
        )
    for what, name, likely in (
        ("the scheduler steps", "scheduler_steps", "scheduler.step() belongs beside optimizer.step()"),
        ("gradients are clipped", "clips", "clipping belongs between the last backward and optimizer.step()"),
    ):
        before, after = (sum(getattr(window, name) for window in windows) for windows in (whole, pieces))
        if after != before:
            raise CheckFailed(
                f"{what} {_times(after, pieces)} in a window of {num} micro-batches, and "
                f"{_times(before, whole)} in one of a single micro-batch\n  likely: it is done "
                "inside the loop; "
                f"{likely}"
            )
    if any(window.scaled_clips for window in pieces):
        raise CheckFailed(
            "gradients are clipped while a loss scaler's factor is still in them\n"
            "  likely: scaler.unscale_(optimizer) is missing before clipping"
        )


def _times(count: int, windows: Sequence[Window]) -> str:
    mean = count / len(windows)
    return "once" if mean == 1 else f"{mean:.3g} times"


def _judge_settings(whole: Sequence[Window], pieces: Sequence[Window], num: int) -> None:
    """Raises CheckFailed where a rate or another number of the optimizer goes by micro-batches."""
    for index, (one, many) in enumerate(zip(whole, pieces, strict=True)):
        for groups, others in zip(one.settings, many.settings, strict=False):
            for group, other in zip(groups, others, strict=False):
                for key, value in group.items():
                    if key in other and not math.isclose(value, other[key], rel_tol=1e-6, abs_tol=1e-15):
                        what = "the learning rate" if key == "lr" else f"the optimizer's {key}"
                        raise CheckFailed(
                            f"{what} in window {index + 1} is {other[key]:.4g} with {num} micro-batches a "
                            f"window, and {value:.4g} with one\n"
                            "  likely: the schedule counts micro-batches; it has to count optimizer steps"
                        )


def _judge_left(whole: Sequence[Window], pieces: Sequence[Window]) -> None:
    for windows in (pieces, whole):
        left = next((window.left for window in windows[1:] if window.left and window.backwards), None)
        if left:
            raise CheckFailed(
                f"{len(left)} parameters still have the gradient of the window before when the "
                "next adds to it: "
                f"{', '.join(left[:3])}\n  likely: zero_grad() is missing; call it once a window"
            )


def _judge_parts(case: TrainingCase, lab: Lab, trial: Trial) -> str | None:
    """A remark on the returned loss.

    Raises CheckFailed where a micro-batch does not count, counts twice, or the loss is one of them.
    """
    window = run_window(lab, trial.parts, TINY)
    apart = lab.apart(trial.parts, TINY, window.states)
    if not window.is_empty and all(not each.is_empty for each in apart):
        had, left = weights_in(window.gradients, [each.gradients for each in apart])
        due = shares(case, trial.parts)
        relative = [one / other if other else 1.0 for one, other in zip(had, due, strict=True)]
        _judge_weights(relative, left, Tolerance.measured(0.0, lab.precision()[1]).relative, even=trial.even)
    elif window.is_empty != all(each.is_empty for each in apart):
        raise CheckFailed(
            f"gradients reach the optimizer from {trial.num} micro-batches or from one alone, and "
            "not from both\n  likely: the last micro-batch is left out; the effective batch is smaller "
            "than the target"
        )
    return _judge_loss(case, window, [each.loss for each in apart], trial)


def _judge_weights(relative: Sequence[float], left: float, rounding: float, *, even: bool) -> None:
    if left > max(UNEXPLAINED, ROUNDINGS * rounding):
        return
    num = len(relative)
    missing = [index for index, ratio in enumerate(relative) if abs(ratio) < NOTHING]
    if missing and len(missing) < num:
        raise CheckFailed(missing_words(missing, num))
    if not even:
        return  # a smaller one that counts as much as the others is ``accumulation_parity``'s to remark
    smallest = min(relative)
    twice = [index + 1 for index, ratio in enumerate(relative) if ratio >= TWICE * smallest]
    if twice and abs(max(relative) / smallest - 2) < 2 * NOTHING:
        listed = ", ".join(map(str, twice))
        which = f"micro-batch {listed}" if len(twice) == 1 else f"micro-batches {listed}"
        raise CheckFailed(f"{which} of {num} counts twice in the gradients")


def _judge_loss(
    case: TrainingCase, window: Window, values: Sequence[float | None], trial: Trial
) -> str | None:
    """A remark on a loss that is not the window's. Raises CheckFailed for that of a single micro-batch."""
    losses = [value for value in values if value is not None]
    if window.loss is None or len(losses) < trial.num:
        return "the step returns no loss, so its logging was not judged"
    due = shares(case, trial.parts)
    right = sum(loss * share for loss, share in zip(losses, due, strict=True))
    plain = sum(losses) / trial.num
    if _close(window.loss, right) or _close(window.loss, plain):
        return None
    returned = f"the step returns {window.loss:.4g} as its loss"
    if _close(window.loss, sum(losses)):
        return f"{returned}, the sum of {trial.num} micro-batches' losses, where the window's is {right:.4g}"
    for index, which in ((-1, "last"), (0, "first")):
        for share, words in (
            (1.0, ""),
            (due[index], f" times {due[index]:.3g}"),
            (1 / trial.num, f" / {trial.num}"),
        ):
            if _close(window.loss, losses[index] * share):
                raise CheckFailed(
                    f"the loss that the step returns for {trial.num} micro-batches, "
                    f"{window.loss:.4g}, is that of "
                    f"the {which}{words}; the window's is {right:.4g}\n"
                    "  likely: the variable of the loop is returned; add up the parts and return their sum"
                )
    return f"{returned}, where the window's is {right:.4g}"


def _close(one: float, other: float) -> bool:
    return math.isclose(one, other, rel_tol=CLOSE, abs_tol=1e-12)


def _judge_clipping(case: TrainingCase, ctx: CheckContext, lab: Lab, chosen: Plan, trial: Trial) -> None:
    """With huge gradients every threshold is reached: clipping of each micro-batch changes their sum.

    Only where, with tiny ones, the pieces make up the whole: in eval mode if not in training.
    """
    tolerance = Tolerance.measured(1e-6, lab.precision()[1])
    if lab.precision()[1] in ("float16", "bfloat16"):
        return
    for quiet in (False, True):
        with contextlib.suppress(Exception):
            used = Lab(case, ctx, double=lab.double, quiet=True) if quiet else lab
            found: list[Any] = []
            for factor in (TINY, HUGE):
                one, many = used.window([chosen.full], factor), used.window(trial.parts, factor)
                found.append(gap(many.gradients, one.gradients, tolerance, {}))
            if found[0].closed:
                break
    else:
        return
    if not found[1].closed:
        raise CheckFailed(
            f"gradients are clipped, or otherwise changed by their size, for each of {trial.num} "
            "micro-batches: "
            f"large ones are not those of the full batch ({len(found[1].wrong)} of {found[1].compared} "
            "parameters), small ones are\n  likely: clipping is done inside the loop; it belongs "
            "between the last "
            "backward and optimizer.step()"
        )
