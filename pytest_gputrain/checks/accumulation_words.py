"""What is said of a window whose gradients are wrong: from the weights that its micro-batches had in them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from pytest_gputrain.checks.accumulation_sums import Gap

SAME, NOTHING = 0.02, 0.02
# Of the gradients, what the weights leave unexplained where they are no explanation; more in coarse types.
UNEXPLAINED, ROUNDINGS = 1e-3, 4


@dataclass(frozen=True)
class Weights:
    """had: of each micro-batch in the window's gradients; due: what they should be; left: unexplained.

    counts: samples or targets of each, in ``unit``. once: the factor that the step has on one micro-batch.
    rounding: what gradients may be off, relative.
    """

    had: Sequence[float]
    due: Sequence[float]
    left: float
    counts: Sequence[int]
    unit: str
    once: float | None
    rounding: float

    @property
    def explain(self) -> bool:
        return self.left <= max(UNEXPLAINED, ROUNDINGS * self.rounding)

    @property
    def relative(self) -> list[float]:
        return [had / due if due else 1.0 for had, due in zip(self.had, self.due, strict=True)]


def words(found: Weights, gap: Gap, named: str) -> str:
    """The message: first line what is wrong, then what is likely behind it."""
    num, counted = len(found.had), f"{len(gap.wrong)} of {max(gap.compared, len(gap.wrong))} parameters"
    if not found.explain:
        return _unexplained(found, gap, counted, named)
    relative = found.relative
    missing = [index for index, ratio in enumerate(relative) if abs(ratio) < NOTHING]
    if missing and len(missing) < num:
        return missing_words(missing, num)
    if max(relative) - min(relative) <= SAME * max(map(abs, relative)):
        ratio = sum(relative) / num
        return (
            f"gradients of {num} micro-batches are {ratio:.3f} x those of the full batch ({counted})\n"
            f"  likely: {_why_factor(ratio, num, found.once)}"
        )
    if max(found.had) - min(found.had) <= SAME * max(map(abs, found.had)):
        counts = ", ".join(map(str, found.counts))
        return (
            f"tokens are averaged naively: {num} micro-batches with {counts} {found.unit} count the same, so "
            f"gradients are not those of the full batch ({counted})\n"
            f"  likely: each micro-batch's mean is divided by {num}; weigh it by its {found.unit} over those "
            "of the whole window"
        )
    had, due = (", ".join(f"{weight:.3f}" for weight in weights) for weights in (found.had, found.due))
    return (
        f"micro-batches count {had} in the gradients; they should count {due} ({counted})\n"
        "  likely: the loss of each is scaled by its own number, and not by its part of the whole window"
    )


def missing_words(missing: list[int], num: int) -> str:
    """Of micro-batches, by index, that have no part in the gradients."""
    if missing == list(range(num - 1)):
        return (
            f"only the last of {num} micro-batches counts in the gradients\n"
            "  likely: gradients are zeroed inside the loop; zero them once, before the first micro-batch"
        )
    if missing == [num - 1]:
        return (
            f"the last of {num} micro-batches does not count in the gradients: the effective batch is "
            "smaller than the target\n  likely: the loop ends one too early, or steps before the "
            "last backward"
        )
    if missing == list(range(1, num)):
        return (
            f"only the first of {num} micro-batches counts in the gradients: the effective batch is "
            "smaller than the target\n  likely: the step or a return stands inside the loop"
        )
    listed = ", ".join(str(index + 1) for index in missing)
    return f"micro-batches {listed} of {num} do not count in the gradients: the effective batch is smaller"


def is_sum(had: Sequence[float]) -> bool:
    """Whether each micro-batch has its whole own gradient in the full batch's."""
    return all(abs(weight - 1) < SAME for weight in had)


def sum_words(num: int, due: str, wrong: str) -> str:
    """Of a loss that the case calls a mean, and that is a sum."""
    return (
        f"the loss is a sum, and the case calls it a mean: in the full batch's loss each of {num} "
        f"micro-batches counts 1.000, in the step {due} {wrong}\n"
        "  likely: give the case loss_reduction='sum', or let the loss divide by its samples"
    )


def why_steps(usual: float) -> str:
    """Of too many optimizer steps in a window of several; usual: in a window of one, on average."""
    if usual < 1:
        return "a fixed number of micro-batches is counted up to; step after the last one that is given"
    return "optimizer.step() stands inside the loop; it belongs after the last micro-batch"


def _why_factor(ratio: float, num: int, once: float | None) -> str:
    if once is not None and abs(ratio - num) < SAME * num and 0 < once < 1 - SAME:
        return (
            f"the step divides by a fixed {1 / once:.4g}, however many micro-batches it gets; "
            "divide by their "
            "number"
        )
    if abs(ratio - num) < SAME * num:
        return f"the loss is not divided by the number of micro-batches, {num}"
    if abs(ratio * num - 1) < SAME:
        return f"it is divided by the number of micro-batches, {num}, twice, or once where the loss is a sum"
    return "the step scales the loss differently for several micro-batches than for one"


def _unexplained(found: Weights, gap: Gap, counted: str, named: str) -> str:
    num = len(found.had)
    why = (
        "a term of the loss (auxiliary, regularisation) is scaled otherwise than the rest, or gradients are "
        "changed between micro-batches"
    )
    return (
        f"gradients of {num} micro-batches are not those of the full batch ({counted}), and no weights of "
        f"the micro-batches make them so: {named}\n  likely: {why}"
    )
