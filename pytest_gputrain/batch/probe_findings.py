"""What a probe saw beside the peak: memory that grows, batches that vary, failures not of memory."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from pytest_gputrain.values import format_size

# A loss kept per step as a number is 4 bytes: years until memory is full. What is full within this many steps
# is told.
SOON = 100_000

# What CUDA, cuDNN, Triton and torch print when a kernel cannot be launched at this size, whatever memory
# there is.
_KERNEL_LIMITS = re.compile(
    r"invalid configuration argument|too many resources requested for launch"
    r"|out of resources?: shared memory|OutOfResources"
    r"|canUse32BitIndexMath|INT_MAX|int32.{0,40}(?:overflow|index)|32-?bit ind"
    r"|CUDNN_STATUS_NOT_SUPPORTED|batch size .{0,20}65535",
    re.IGNORECASE,
)


@dataclass
class Observed:
    """Of the probes at one batch size. Sizes in bytes.

    peak: None when memory ran out, with ``message`` then; swallowed: the case's own code caught that.
    by_category: at the peak. live: in use after each step. varying: (smallest, largest) number of values of a
    batch where batches of one batch size differ.
    """

    peak: int | None = None
    message: str = ""
    by_category: dict[str, int] = field(default_factory=dict)
    live: list[int] = field(default_factory=list)
    varying: tuple[int, int] | None = None
    in_evaluation: bool = False
    swallowed: bool = False

    def after_step(self, in_use: int) -> None:
        self.live.append(in_use)

    def ran_out(self, error: BaseException) -> None:
        """Note where memory ran out."""
        self.message = str(error)
        if at_failure := getattr(error, "by_category", None):
            self.by_category = dict(at_failure)

    @property
    def where(self) -> str:
        """In which part of the probe it ended: ``step 2``, ``evaluation``."""
        return "evaluation" if self.in_evaluation else f"step {len(self.live) + 1}"

    @property
    def failure(self) -> str:
        """Where memory ran out, and for what; what it was in use for is told by ``by_category``."""
        caught = ", which the case's code caught to go on without it" if self.swallowed else ""
        return f"in {self.where}: {self.message.partition(' (in use:')[0]}{caught}"

    @property
    def growth(self) -> int:
        """Bytes by which memory grows from step to step, 0 where it does not grow in each of them."""
        steps = [after - before for before, after in zip(self.live, self.live[1:], strict=False)]
        return min(steps) if len(steps) > 1 and min(steps) > 0 and self.varying is None else 0

    def notes(self, batch_size: int, limit: int) -> list[str]:
        """One line for each thing that makes an answer of this batch size doubtful."""
        said = []
        if self.growth and self.peak is not None and limit - self.peak < SOON * self.growth:
            steps = max(1, (limit - self.peak) // self.growth)
            said.append(
                f"memory grows by {format_size(self.growth)} a step at batch size {batch_size}: "
                f"out of memory after about {steps} step{'s' * (steps != 1)}; something keeps tensors "
                "of past steps (a list of losses without .item()?)"
            )
        if self.varying:
            smallest, largest = self.varying
            said.append(
                f"batches of size {batch_size} vary from {smallest} to {largest} values: probed with the "
                "largest of those drawn, a longer one needs more, and varying lengths fragment a GPU's "
                "memory; let the case's batch() give the longest"
            )
        return said


def kernel_limit(
    error: BaseException, batch_size: int, observed: Mapping[int, Observed], limit: int
) -> str | None:
    """One line where this batch size fails, though not of memory, and a smaller one ran; None otherwise."""
    fitting = {
        size: seen.peak for size, seen in observed.items() if seen.peak is not None and size < batch_size
    }
    if not fitting:
        return None
    size = max(fitting)
    peak = fitting[size] or 0
    known = (
        "a kernel's limit" if _KERNEL_LIMITS.search(f"{type(error).__name__}: {error}") else "something else"
    )
    return (
        f"memory is not what fails at batch size {batch_size}: {known} does ({type(error).__name__}); "
        f"{size} ran, with a peak of {format_size(peak)} of {format_size(limit)}; "
        f"give max_batch_size={batch_size - 1} or less"
    )
