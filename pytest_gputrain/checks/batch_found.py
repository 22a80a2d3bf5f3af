"""Is the batch size that is found the right one, and is everything afterwards as it was?

The right answer is measured first, by real steps of the case at fresh models; then the finder is asked, in
another process, beside a model that is being trained. On CPU the memory is that of tensors, by accounting.
The budget is chosen from the case, so that a small model has a largest batch size, too.
"""

from __future__ import annotations

from pytest_gputrain.case import TrainingCase
from pytest_gputrain.checks.batch_asked import GLOBAL, PLAIN, Answers, ask_all
from pytest_gputrain.checks.batch_finders import name_of
from pytest_gputrain.checks.batch_scene import Scene, find_scene
from pytest_gputrain.checks.batch_verdict import Question, judge_size
from pytest_gputrain.checks.context import CheckContext
from pytest_gputrain.checks.ranks import alone
from pytest_gputrain.checks.registry import check
from pytest_gputrain.checks.result import CheckFailed, CheckSkipped, Figures
from pytest_gputrain.report.metrics import once
from pytest_gputrain.report.series import series
from pytest_gputrain.values import format_size

# Left behind by an exception that is kept are the activations of a whole step; a cache of a mask is less.
LEFT_BYTES = 4096

_scenes: dict[int, tuple[TrainingCase, str, Scene]] = {}


@check("batch_size_found", subject="batch size")
def check_batch_size_found(case: TrainingCase, ctx: CheckContext) -> Figures:
    """Fails when the size is not the maximum, does not divide the global batch, or leaves traces."""
    scene = scene_of(case, ctx)
    if scene.growth.per_step:
        raise CheckSkipped(
            "memory grows from step to step, so that no size is the largest: batch_size_holds says why"
        )
    answers: Answers = alone(
        ask_all, case, ctx, scene, doing=f"looking for the batch size ({name_of(ctx.finder)})"
    )
    figures: Figures = {
        "batch size": answers.sizes.get(PLAIN),
        "budget": format_size(scene.budget),
        "seconds to find": round(answers.seconds, 2),
        "notes": [*scene.notes],
        "metrics": _metrics(scene),
        "series": [_ladder(scene)],
    }
    _judge_errors(answers, figures)
    _judge_traces(answers, scene, figures)
    questions = {
        PLAIN: Question(scene.budget, scene.answer),
        GLOBAL: Question(scene.budget, scene.global_answer, scene.global_batch),
    }
    for name, size in answers.sizes.items():
        judge_size(case, ctx, scene, size, questions[name], figures)
    return figures


def _metrics(scene: Scene) -> Figures:
    """By size, for at another one other bytes are no regression; and what a sample more takes at any.

    Not the size found: its budget is chosen from the case, and on a slow machine smaller sizes do.
    """
    found = {2 * scene.minimum: scene.small_takes, scene.answer: scene.takes}
    peaks = {f"peak_bytes_at_{size}": peak for size, peak in found.items() if peak is not None}
    if scene.next_takes is not None:
        peaks["bytes_per_sample"] = scene.next_takes - scene.takes
    return {name: once(peak, unit="bytes", better="lower", spread=0.0) for name, peak in peaks.items()}


def _ladder(scene: Scene) -> Figures:
    """What each size takes, and the budget that the finder was given."""
    sizes, peaks = zip(*scene.peaks, strict=True)
    label = f"peak; {scene.answer} is the largest that fits"
    return series(
        "ladder", label, peaks, x=sizes, unit="bytes", limit=scene.budget, limit_label="memory budget"
    )


def scene_of(case: TrainingCase, ctx: CheckContext) -> Scene:
    """Measured once a case and device: both checks ask for it."""
    found = _scenes.get(id(case))
    if found is None or found[1] != ctx.device:
        scene: Scene = alone(find_scene, case, ctx, doing="training at several batch sizes, without a limit")
        # With the case, so that its id stays its own.
        found = _scenes[id(case)] = (case, ctx.device, scene)
    return found[2]


def _judge_errors(answers: Answers, figures: Figures) -> None:
    if answers.error:
        raise CheckFailed(f"the finder raised instead of giving a batch size: {answers.error}", figures)
    if answers.swallowed is not None:
        raise CheckFailed(
            "a TypeError in the training step is taken for out of memory: the finder answers "
            f"{answers.swallowed} instead of raising it\n"
            "  likely: `except Exception` around a try; treat as out of memory only what is, and raise the "
            "rest",
            figures,
        )


def _judge_traces(answers: Answers, scene: Scene, figures: Figures) -> None:
    if answers.left:
        raise CheckFailed(
            f"looking for the batch size left things behind that were not so before: {answers.left}\n"
            "  likely: tries on the model that is to be trained; save its state, the optimizer's and the "
            "random "
            "state before, restore them after, or try on a copy",
            figures,
        )
    a_sample = (scene.next_takes or scene.takes) - scene.takes
    if answers.leaked > max(LEFT_BYTES, 2 * a_sample):
        raise CheckFailed(
            f"looking for the batch size left {format_size(answers.leaked)} of memory in use\n"
            "  likely: the exception of a try that ran out of memory is kept, and with it, by its "
            "traceback, what "
            "that try had allocated; or the case keeps tensors of each step (batch_size_holds tells)",
            figures,
        )
