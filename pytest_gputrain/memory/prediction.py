"""What a prediction says, and how it prints. Pure: needs no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from pytest_gputrain.memory.categories import describe
from pytest_gputrain.values import format_size


@dataclass(frozen=True)
class ErrorBar:
    """How far off a prediction may be, as fractions of it, and for which programs that was seen."""

    low: float
    high: float
    of: str


# The worst of some forty small models at two batch sizes, rounded up. Kernels take and give back memory
# within themselves (convolutions), or keep more than fake tensors show (recurrent layers); where a selection
# by unknown values sizes a tensor (a router), the largest result is taken.
ERROR_BARS = {
    "other": ErrorBar(-0.10, 0.05, "linear layers, attention, norms"),
    "convolution": ErrorBar(
        -0.10, 0.90, "convolutions, whose workspaces are not counted (worst on tiny models)"
    ),
    "recurrent": ErrorBar(-0.05, 0.95, "recurrent layers, whose kernels keep more than is counted"),
    "selection": ErrorBar(-0.40, 0.10, "selections by values that are not known, taken at their largest"),
}
ERROR_BAR_ORIGIN = "against what torch's CPU allocator handed out; never compared with a GPU yet"
# The law is said not to hold where it misses a third prediction by more than this.
LAW_HOLDS = 0.01


@dataclass(frozen=True)
class Law:
    """Peak = ``fixed_bytes`` + ``bytes_per_sample`` x batch size, through two predictions.

    floor_bytes: what the optimizer's step needs whatever the batch size, where that is more;
    floor_bytes_per_sample is what it has to keep of the batch meanwhile
    deviation:   how far the line misses a third prediction, at ``verified_at``, as a fraction of it

    Calling it gives the peak in bytes at a batch size.
    """

    fixed_bytes: float
    bytes_per_sample: float
    floor_bytes: float
    floor_bytes_per_sample: float
    verified_at: int
    deviation: float

    @classmethod
    def through(cls, peaks: Mapping[int, tuple[int, int]]) -> Law:
        """The lines through the first two of three, and how far the first line misses the third.

        peaks: batch size -> peak outside of the optimizer's step, and within it
        """
        (first, low), (second, high), (third, (seen, _)) = peaks.items()
        slope, floor_slope = ((more - less) / (second - first) for less, more in zip(low, high, strict=True))
        fixed = low[0] - slope * first
        deviation = abs(fixed + slope * third - seen) / seen
        return cls(fixed, slope, low[1] - floor_slope * first, floor_slope, third, deviation)

    @property
    def holds(self) -> bool:
        return self.deviation <= LAW_HOLDS

    def __call__(self, batch_size: float) -> float:
        floor = self.floor_bytes + self.floor_bytes_per_sample * batch_size
        return max(self.fixed_bytes + self.bytes_per_sample * batch_size, floor)

    def __str__(self) -> str:
        line = (
            f"{format_size(round(self.fixed_bytes))} + {format_size(round(self.bytes_per_sample))} a sample, "
            f"at least {format_size(round(self.floor_bytes))} in the optimizer's step "
            f"({self.deviation:.1%} off at {self.verified_at})"
        )
        return line if self.holds else f"{line}: not a straight line, do not extrapolate"


@dataclass(frozen=True)
class Prediction:
    """The peak of one training step, from fake tensors: predicted, not measured.

    peak_bytes:     the most that tensors need at one time, the optimizer's state included
    by_category:    the same by what it is for, keys as in ``memory.categories.CATEGORIES``
    overhead_bytes: what the device needs besides (a CUDA context)
    error_bar:      how far off this may be: the true peak is within these fractions of it
    notes:          what the prediction stands on, one line each; read them
    """

    case: str
    batch_size: int
    peak_bytes: int
    by_category: Mapping[str, int]
    law: Law
    device: str
    error_bar: ErrorBar
    capacity: int | None = None
    overhead_bytes: int = 0
    notes: tuple[str, ...] = ()

    @property
    def fits(self) -> bool | None:
        """Whether it fits the capacity; None where none was given."""
        return None if self.capacity is None else self.peak_bytes + self.overhead_bytes <= self.capacity

    @property
    def certain(self) -> bool | None:
        """Whether ``fits`` is the same at both ends of the error bar; None without a capacity."""
        if self.capacity is None:
            return None
        room = self.capacity - self.overhead_bytes
        low, high = self.peak_bytes * (1 + self.error_bar.low), self.peak_bytes * (1 + self.error_bar.high)
        return not low <= room < high

    def __str__(self) -> str:
        lines = [
            f"{self.case} at batch size {self.batch_size} on {self.device}: predicted peak "
            f"{format_size(self.peak_bytes)} ({describe(self.by_category)})",
            f"  law: {self.law}",
            f"  error bar: {self.error_bar.low:+.0%} to {self.error_bar.high:+.0%}, for {self.error_bar.of}; "
            f"{ERROR_BAR_ORIGIN}",
        ]
        if self.capacity is not None:
            lines.insert(1, f"  {self._verdict(self.capacity)}")
        return "\n".join([*lines, *(f"  {note}" for note in self.notes)])

    def _verdict(self, capacity: int) -> str:
        fits = "fits" if self.fits else "does not fit"
        beside = f" beside {format_size(self.overhead_bytes)} of overhead" if self.overhead_bytes else ""
        doubt = "" if self.certain else ", but that is within the error bar"
        return f"{fits} {format_size(capacity)}{beside}{doubt}"


@dataclass(frozen=True)
class MaximumPrediction:
    """The largest batch size that is predicted to fit: 0 where none does.

    prediction: that at ``size`` (at ``minimum`` where nothing fits); beyond: peak in bytes at ``size`` + 1,
    which does not fit, None where ``size`` is the largest that was asked about.
    """

    size: int
    prediction: Prediction
    beyond: int | None

    def __str__(self) -> str:
        if not self.size:
            return f"predicted maximum batch size: none fits\n{self.prediction}"
        after = (
            "the largest asked about"
            if self.beyond is None
            else f"{self.size + 1} needs {format_size(self.beyond)}"
        )
        return f"predicted maximum batch size: {self.size} ({after})\n{self.prediction}"
