"""What a discovery came to, and why nothing fits if nothing does. Imports no torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from pytest_gputrain.batch.search import SearchResult
from pytest_gputrain.values import format_size

OnProbe = Callable[[int, "float | None", float], None]
SOURCES = ("discovered", "cache", "override", "disabled", "fallback")

# By what most of the memory is for where not even the smallest batch fits. Names as in memory/categories.py.
WAYS_OUT = {
    "activations": "activation checkpointing or a shorter max_seq_len",
    "optimizer state": "an optimizer with less state (8-bit AdamW, Adafactor) or one that is sharded (ZeRO)",
    "gradients": "sharding (FSDP) or parameters of lower precision",
    "parameters": "sharding (FSDP), parameters of lower precision or a smaller model",
    "buffers": "smaller buffers",
    "other": "a smaller input, or a foreach=False optimizer, which needs fewer temporaries",
}


@dataclass(frozen=True)
class Discovered:
    """``size``: the device batch size, 0 when the smallest legal one does not fit (``too_large()`` says why).

    capacity, limit: bytes; the limit is capacity times margin. law: (fixed bytes, bytes a sample) of a line
    through the peaks, None with fewer than two. seconds: all of it. source: one of ``SOURCES``. by_category:
    bytes at the peak of the answer, or where memory ran out if there is none; empty from a cache. warnings:
    what makes the answer doubtful. data_parallel: how its buckets were counted, "" without. failure: where
    the smallest size ran out. known: peaks by batch size that an earlier discovery measured, None where it
    ran out; cache_key: under which a cache keeps them. Both empty without a cache.
    """

    size: int
    search: SearchResult
    capacity: int
    limit: int
    law: tuple[float, float] | None
    seconds: float
    source: str
    by_category: Mapping[str, int] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()
    data_parallel: str = ""
    failure: str = ""
    known: Mapping[int, float | None] = field(default_factory=dict)
    cache_key: Mapping[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        """The answer in one line, to print."""
        if not self.size:
            return f"nothing fits within {format_size(self.limit)}: {self.failure}"
        peak = {**self.known, **dict(self.search.probes)}.get(self.size)
        shown = "" if peak is None else f": peak {format_size(round(peak))} of {format_size(self.limit)}"
        return f"device batch size {self.size} ({self.source}){shown}"

    @property
    def smallest(self) -> int:
        """The smallest batch size that was run, 0 when none was."""
        return min((size for size, _ in self.search.probes), default=0)

    def too_large(self, name: str) -> str:
        """Why nothing fits, what memory is for, and the ways out; ``name``: the model's."""
        parts = sorted(self.by_category.items(), key=lambda part: -part[1])
        shown = ", ".join(f"{what} {format_size(size)}" for what, size in parts if size) or "nothing"
        ways = WAYS_OUT.get(parts[0][0], "") if parts else ""
        return (
            f"{name} does not fit at batch size {self.smallest}; {self.failure}\n"
            f"  limit {format_size(self.limit)} of a capacity of {format_size(self.capacity)}; "
            f"in use before that: {shown}\n"
            f"  what helps: {ways or 'a smaller model'}; or more memory (capacity, safety_margin)"
        )


def not_a_case(case: object) -> str:
    """What is wrong with ``case``, in one line."""
    way_out = "give a TrainingCase, such as pytest_gputrain.case.load_case('MODULE:ATTR')[0]"
    return f"case is {case!r:.60} ({type(case).__name__}); {way_out}"


def line_through(points: list[tuple[int, float]]) -> tuple[float, float] | None:
    """Least squares through (batch size, peak): (fixed bytes, bytes a sample); None for fewer than two
    points.
    """
    if len(points) < 2:
        return None
    mean_size = sum(size for size, _ in points) / len(points)
    mean_peak = sum(peak for _, peak in points) / len(points)
    spread = sum((size - mean_size) ** 2 for size, _ in points)
    slope = sum((size - mean_size) * (peak - mean_peak) for size, peak in points) / spread
    return mean_peak - slope * mean_size, slope
