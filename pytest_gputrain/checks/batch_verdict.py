"""An answer that is not the expected one: wrong, or right with other data?"""

from __future__ import annotations

from dataclasses import dataclass

from pytest_gputrain.case import TrainingCase
from pytest_gputrain.checks.batch_runs import Ran, run
from pytest_gputrain.checks.batch_scene import Scene
from pytest_gputrain.checks.context import CheckContext
from pytest_gputrain.checks.ranks import alone
from pytest_gputrain.checks.result import CheckFailed, Figures
from pytest_gputrain.values import format_size

# Batches of other content: a size may fit or not by what they hold (routing, dropped layers, lengths).
SEEDS = 6

WHY_TOO_LARGE = {
    "optimizer": "the tries take no optimizer step, or one only: its state comes with the first",
    "later step": (
        "the tries take no optimizer step, or one only: its state lies beside activations from the second on"
    ),
    "evaluation": "the tries do not evaluate at this size, and evaluation needs more than training here",
    "first step": "this size was never tried: it is from a stale cache, or a curve that does not hold here",
}
WHY_ACCUMULATING = (
    "the tries take steps of one batch; where a step accumulates, gradients lie beside the activations"
)


@dataclass(frozen=True)
class Question:
    """A budget in bytes, the size that is right for it, and the global batch that it has to divide."""

    budget: int
    right: int
    global_batch: int = 0

    def after(self, size: int, maximum: int) -> int | None:
        """The next larger size that could have been answered."""
        larger = range(size + 1, maximum + 1)
        return next((n for n in larger if not self.global_batch or self.global_batch % n == 0), None)

    def accumulates(self, size: int) -> bool:
        return self.global_batch > size

    def __str__(self) -> str:
        under = f"under a budget of {format_size(self.budget)}"
        return f"{under} and for a global batch of {self.global_batch}" if self.global_batch else under


@dataclass(frozen=True)
class Tried:
    """ran_out: where the answer ran out, whatever the data; after_takes: bytes of the size after it."""

    ran_out: Ran | None
    after_takes: int | None


def judge_size(
    case: TrainingCase, ctx: CheckContext, scene: Scene, size: int, asked: Question, figures: Figures
) -> None:
    """Raises CheckFailed for an answer that does not fit, or is not the largest that does."""
    if size == asked.right:
        return
    said = f"the batch size found {asked} is {size}"
    if size > scene.maximum:
        raise CheckFailed(f"{said}; sizes from {scene.minimum} to {scene.maximum} were asked for", figures)
    if asked.global_batch and size > 0 and asked.global_batch % size:
        raise CheckFailed(
            f"{said}, which does not divide {asked.global_batch}; {asked.right} does, and fits\n"
            "  likely: the largest size that fits is answered, whatever the global batch; answer its largest "
            "divisor that fits",
            figures,
        )
    after = asked.after(max(size, scene.minimum - 1), scene.maximum)
    tried: Tried = alone(_try, case, ctx, scene, size, after, asked, doing=f"training at batch size {size}")
    if tried.ran_out is not None:
        ran = tried.ran_out
        likely = (
            WHY_ACCUMULATING if asked.accumulates(size) and "step" in ran.part else WHY_TOO_LARGE[ran.part]
        )
        raise CheckFailed(
            f"{said}, but at {size} memory runs out in {ran.where}; {asked.right} is the largest that fits\n"
            f"  likely: {likely}\n  in use before it did: {format_size(ran.peak)} ({ran.shares})",
            figures,
        )
    if tried.after_takes is not None and tried.after_takes <= asked.budget:
        raise CheckFailed(
            f"{said}, but {after} fits, too: training and evaluation take {format_size(tried.after_takes)} "
            "at most\n"
            f"  likely: {_why_too_small(size, asked.right)}",
            figures,
        )
    figures["notes"].append(
        f"answered {size} where {asked.right} is expected {asked}, and right, too: memory varies with the "
        "data, falls "
        "with the size, or differs by less than a batch"
    )


def _why_too_small(size: int, right: int) -> str:
    if size <= 0:
        return (
            "a safety margin taken off the size and rounded down, instead of taken off the memory; or memory "
            "that comes later than in 3 steps of a fresh model and optimizer (batch_size_holds tells)"
        )
    if size == int(0.85 * right):
        return "a safety margin taken off the size, not off the memory, or sizes that are only ever doubled"
    if size & (size - 1) == 0 and right < 2 * size:
        return "sizes are doubled until one fails, and nothing in between is tried"
    return "what an earlier try left was still in memory, or another failure was counted as out of memory"


def _try(
    case: TrainingCase, ctx: CheckContext, scene: Scene, size: int, after: int | None, asked: Question
) -> Tried:
    """In the rank: the answer and the size after it, with several batches each."""
    accumulation = 2 if asked.accumulates(size) else 1

    def tried(batch_size: int, *, data: int = 0, limit: int | None = None) -> Ran:
        return run(
            case,
            ctx,
            batch_size,
            accumulation=accumulation,
            data=data,
            limit=limit,
            evaluating=scene.evaluates,
        )

    def peaks(batch_size: int) -> tuple[int, int]:
        """The lowest and the highest, and as far beyond as they are apart, or a batch takes."""
        found = [tried(batch_size, data=data).peak for data in range(SEEDS)]
        slack = max(found) - min(found) + scene.sample * batch_size
        return min(found) - slack, max(found) + slack

    least = peaks(size)[0] if size >= scene.minimum else 0
    ran_out = tried(size, limit=asked.budget) if least > asked.budget else None
    return Tried(ran_out, peaks(after)[1] if after is not None else None)
