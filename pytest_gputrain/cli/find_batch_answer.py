"""What ``gputrain find-batch`` found, as text, as JSON and as a picture. Plain values: imports no torch."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from pytest_gputrain.batch.discovered import WAYS_OUT
from pytest_gputrain.values import format_size

if TYPE_CHECKING:
    from pytest_gputrain.batch.accumulation import AccumulationPlan
    from pytest_gputrain.report.ladder_plot import Ladder

MEASURED, PREDICTED = "measured", "predicted"


@dataclass(frozen=True, kw_only=True)
class Answer:
    """size: the device batch size, 0 where none fits; minimum: the smallest that was asked about.

    ladder: (batch size, peak in bytes, None where memory ran out), in order of running. law: (fixed bytes,
    bytes a sample), and law_floor what is needed whatever the size. given: whether capacity is the user's,
    not the device's. capacity, limit, by_category, overhead_bytes: bytes. source: "discovered" or "cache" of
    what was measured. error_bar: how far the truth may be below and above a prediction, as fractions of it.
    failure: where memory ran out at the minimum. beside: the peak at the answer in bytes as other methods see
    it, "estimate" by formula and "predicted" from fake tensors.
    """

    case: str
    method: str
    device: str
    given: bool
    capacity: int
    limit: int
    margin: float
    minimum: int
    size: int
    ladder: tuple[tuple[int, float | None], ...]
    law: tuple[float, float] | None
    by_category: Mapping[str, int]
    seconds: float
    source: str = "discovered"
    at_maximum: bool = False
    warnings: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    failure: str = ""
    beside: Mapping[str, int] = field(default_factory=dict)
    overhead_bytes: int = 0
    law_floor: float = 0.0
    error_bar: tuple[float, float] | None = None
    error_bar_origin: str = ""
    plan: AccumulationPlan | None = field(default=None)

    @property
    def peak(self) -> int | None:
        """Bytes at the answer; None where there is none, or it is not known."""
        found = dict(self.ladder).get(self.size)
        return None if found is None else int(found)

    def text(self) -> str:
        """The lines below the table; the first one says it all."""
        lines = [self._found() if self.size else self._too_large()]
        lines += [f"  it ran out {self.failure}"] if self.failure else []
        if self.by_category and not self.failure:  # which says it
            where = "at the peak" if self.size else f"at batch size {self.minimum}"
            lines.append(f"  {where}: {self._categories()}")
        if self.beside and self.size:
            lines.append(f"  the peak by method: {self._by_method()}")
        if self.law is not None:
            fixed, slope = (format_size(max(0, round(part))) for part in self.law)
            floor = f", at least {format_size(round(self.law_floor))}" if self.law_floor else ""
            lines.append(f"  memory: {fixed} + {slope} a sample{floor}, by a line through the peaks")
        if self.plan is not None:
            lines.append(f"  for a global batch of {self.plan.target}: {self.plan}")
        if self.error_bar is not None:
            low, high = self.error_bar
            lines.append(f"  predicted, not measured: {low:+.0%} to {high:+.0%} ({self.error_bar_origin})")
        lines += [f"  warning: {warning}" for warning in self.warnings]
        return "\n".join([*lines, *(f"  {note}" for note in self.notes)])

    def _found(self) -> str:
        peak = f": peak {format_size(self.peak)} of {self._limit()}" if self.peak is not None else ""
        if self.source == "cache":
            return f"device batch size {self.size}, measured earlier (--no-cache measures again){peak}"
        word = "predicted device batch size" if self.method == PREDICTED else "device batch size"
        return f"{word} {self.size}{peak}; {self._next()}"

    def _next(self) -> str:
        if self.plan is not None and self.size == self.plan.samples_per_rank:
            return "that is all of a rank's samples"
        if self.at_maximum:
            return "no larger one was asked about (--max)"
        over = min(
            (size for size, peak in self.ladder if size > self.size and self._is_over(peak)), default=None
        )
        if over is None:
            return "the next one does not fit"
        return f"{over} {'would not fit' if self.method == PREDICTED else 'ran out of memory'}"

    def _is_over(self, peak: float | None) -> bool:
        return peak is None or peak > self.limit

    def _too_large(self) -> str:
        if self.overhead_bytes >= self.limit:
            return (
                f"{self.case} does not fit: the CUDA context alone takes {format_size(self.overhead_bytes)} "
                f"(assumed) of {self._limit()}; give the capacity of a whole GPU, or --device cpu to run "
                "real steps within so little"
            )
        tried = "is predicted not to fit" if self.method == PREDICTED else "runs out of memory"
        smaller = "a smaller --min, " if self.minimum > 1 else ""
        return (
            f"{self.case} does not fit: batch size {self.minimum} {tried} within {self._limit()}; "
            f"{self._largest_part()}what helps: {smaller}{self._way_out()}, or more memory"
        )

    def _largest_part(self) -> str:
        name = max(self.by_category, key=lambda name: self.by_category[name], default="")
        return f"most is for {name}; " if name and self.by_category[name] else ""

    def _way_out(self) -> str:
        name = max(self.by_category, key=lambda name: self.by_category[name], default="")
        return WAYS_OUT.get(name, "a smaller model")

    def _limit(self) -> str:
        return f"{format_size(self.limit)} ({self.margin:g} x {format_size(self.capacity)})"

    def _categories(self) -> str:
        parts = sorted(self.by_category.items(), key=lambda part: -part[1])
        shown = [f"{name} {format_size(size)}" for name, size in parts if size]
        if self.overhead_bytes:
            shown.append(f"CUDA context {format_size(self.overhead_bytes)} (assumed)")
        return ", ".join(shown)

    def _by_method(self) -> str:
        return ", ".join(f"{method} {format_size(size)}" for method, size in self.peaks_by_method().items())

    def peaks_by_method(self) -> dict[str, int]:
        """Bytes at the answer, the roughest first: an estimate is never shown without what it is."""
        own = {} if self.peak is None else {self.method: self.peak - self.overhead_bytes}
        return {**self.beside, **own}

    def document(self) -> dict[str, Any]:
        """The same for programs; sizes in bytes."""
        return {
            "case": self.case,
            "method": self.method,
            "device": self.device,
            "capacity_bytes": self.capacity,
            "capacity_given": self.given,
            "safety_margin": self.margin,
            "limit_bytes": self.limit,
            "device_batch_size": self.size,
            "at_maximum": self.at_maximum,
            "peak_bytes": self.peak,
            "peak_by_method": self.peaks_by_method() if self.size else {},
            "by_category": dict(self.by_category),
            "overhead_bytes": self.overhead_bytes,
            "law": self._law(),
            "probes": [
                {"batch_size": size, "peak_bytes": None if peak is None else int(peak)}
                for size, peak in self.ladder
            ],
            "error_bar": None if self.error_bar is None else [*self.error_bar],
            "error_bar_origin": self.error_bar_origin or None,
            "source": self.source,
            "plan": None if self.plan is None else plan_document(self.plan),
            "failure": self.failure or None,
            "warnings": [*self.warnings],
            "notes": [*self.notes],
            "seconds": round(self.seconds, 3),
        }

    def _law(self) -> dict[str, float] | None:
        if self.law is None:
            return None
        fixed, slope = self.law
        return {"fixed_bytes": fixed, "bytes_per_sample": slope, "floor_bytes": self.law_floor}

    def picture(self, footnote: str) -> Ladder:
        """The same for the eyes."""
        from pytest_gputrain.report.ladder_plot import Ladder

        what = f"device batch size {self.size}" if self.size else f"batch size {self.minimum} does not fit"
        return Ladder(
            title=f"{self.case} on {self.device}: {what}, {self.method}",
            points=self.ladder,
            law=self.law,
            floor=self.law_floor,
            capacity=self.capacity,
            limit=self.limit,
            size=self.size,
            error_bar=self.error_bar,
            footnote=footnote,
        )


def plan_document(plan: AccumulationPlan) -> dict[str, Any]:
    """The plan for programs; batch sizes in samples."""
    return {
        **dataclasses.asdict(plan),
        "global_batch_size": plan.global_batch_size,
        "micro_batches": [*plan.micro_batches()],
    }
