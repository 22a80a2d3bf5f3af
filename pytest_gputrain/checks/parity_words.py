"""Parameters that are off in ``ddp_parity``, and what is said of them."""

from __future__ import annotations

from dataclasses import dataclass, field

from pytest_gputrain.trace.names import Owner

SAME_FACTOR = 0.02


@dataclass(frozen=True)
class Deviation:
    """One parameter that is off. ratio: the factor that explains most of it; rest: what it leaves.

    words: what is said of it in place of "off by"; moment: whose gradient it is.
    """

    name: str
    error: float
    ratio: float
    rest: float
    words: str = ""
    moment: str = ""


@dataclass
class Comparison:
    """All parameters of one step."""

    step: int
    micro_batches: int
    compared: int = 0
    worst: float = 0.0
    wrong: list[Deviation] = field(default_factory=list)


def told(
    comparison: Comparison, what: str, at: str, *, all_steps: bool, world_size: int, owners: dict[str, Owner]
) -> tuple[str, bool]:
    """What is said of a step with deviations, and whether the words say the cause."""
    wrong = sorted(comparison.wrong, key=lambda deviation: -deviation.error)
    when = "in every step" if all_steps else f"in step {comparison.step}"
    if not all_steps and comparison.micro_batches > 1:
        when += f", which has {comparison.micro_batches} micro-batches"
    counted = f"{len(wrong)} of {max(comparison.compared, len(wrong))} parameters"
    ratio = wrong[0].ratio
    if what == "gradients" and all(is_factor(deviation, ratio) for deviation in wrong):
        names = "" if len(wrong) == comparison.compared else f": {_named(wrong, owners)}"
        return (
            f"{at}gradients are {ratio:.3f} x the single-process reference on every rank ({counted}) "
            f"{when}{names}\n  likely: {_why_factor(ratio, world_size)}"
        ), True
    return (
        f"{at}{what} differ from the single-process reference on every rank ({counted}) {when}: "
        f"{_named(wrong, owners)}"
    ), False


def _named(wrong: list[Deviation], owners: dict[str, Owner]) -> str:
    texts = []
    for deviation in wrong[:5]:
        how = deviation.words or f"off by {deviation.error:.1%}"
        owner = f" ({owners[deviation.name]})" if deviation.name in owners else ""
        texts.append(f"{deviation.name}{owner} {how}")
    more = f" and {len(wrong) - 5} more" if len(wrong) > 5 else ""
    return ", ".join(texts) + more


def _why_factor(ratio: float, world_size: int) -> str:
    if abs(ratio - world_size) < SAME_FACTOR * world_size:
        return f"they are summed over ranks and not divided by the world size {world_size}"
    if abs(ratio * world_size - 1) < SAME_FACTOR:
        return f"gradients are divided by the world size {world_size} twice"
    return "the step scales the loss or the gradients differently on several ranks than on one"


def is_factor(deviation: Deviation, factor: float) -> bool:
    """Whether the factor explains all of the deviation."""
    close = abs(deviation.ratio - factor) <= SAME_FACTOR * abs(factor)
    return close and deviation.rest <= SAME_FACTOR and not deviation.words
