"""The largest batch size that fits, found by running as few as possible. Pure: no torch, clock or logging.

The answer is exact for memory that grows with the batch: it was run and fits, and the next legal size was run
and does not. Neither is ever inferred: the model only chooses what to run. Believing it would save the probe
that runs out of memory, and be wrong by one wherever the allocator rounds. So a search costs at least one
probe that does not fit, unless ``maximum`` does.

Not covered: where memory does not grow with the batch, the answer still was run and its next size does not
fit, but a still larger one may; ``warning`` says so as far as the probes show it.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from pytest_gputrain.batch.evidence import Evidence, checked_peak
from pytest_gputrain.batch.ladder import legal_sizes
from pytest_gputrain.batch.strategies import Exponential, Model, Strategy

STRATEGIES = ("model", "exponential")


@dataclass(frozen=True)
class SearchResult:
    """``size``: the largest batch size that fits, 0 when the smallest legal one does not.

    ``probes``: (batch size, peak or None when memory ran out) of what this search ran, in that order, without
    what was known before. ``warning``: what makes the answer doubtful, or why there is none.
    """

    size: int
    probes: tuple[tuple[int, float | None], ...]
    warning: str | None = None


def find_maximum(
    probe: Callable[[int], float | None],
    *,
    minimum: int = 1,
    maximum: int,
    capacity: float,
    multiple_of: int = 1,
    divides: int | None = None,
    strategy: str = "model",
    predicted: Callable[[int], float] | None = None,
    known: Mapping[int, float | None] | None = None,
    show: Callable[[float], str] = "{:.6g}".format,
) -> SearchResult:
    """Find the largest legal batch size whose peak is within ``capacity``, by running ``probe`` on few sizes.

    ``probe(batch_size)`` returns the peak in the unit of ``capacity``, or None when memory ran out; what it
    raises is passed on. Legal are the multiples of ``multiple_of`` in ``minimum``..``maximum`` that divide
    ``divides``, if given. The strategy "model" jumps by the measured peaks; "exponential" doubles, then
    bisects and uses no peaks.

    ``predicted`` (peak by batch size, cheap to call) says where to look and is never believed. ``known``
    (peak by batch size, measured before) counts as run; a None in it must be of this capacity or a larger
    one. ``show``: a peak as text, for warnings. Raises ``ValueError`` for what is not legal.
    """
    sizes = legal_sizes(minimum, maximum, multiple_of, divides)
    chooser = _strategy(strategy, predicted)
    evidence = Evidence(sizes, _checked_capacity(capacity), known, show)
    while (bracket := _open(evidence)) is not None:
        rung = chooser.choose(evidence)
        assert bracket[0] < rung < bracket[1], f"{rung} is outside of {bracket}"  # else this never ends
        size = sizes[rung]
        evidence.add(size, checked_peak(probe(size), f"the result of probe({size})"))
    low, _ = evidence.bracket()
    answer = sizes[low] if low >= 0 else 0
    return SearchResult(answer, tuple(evidence.fresh.items()), _warning(evidence, answer))


def _open(evidence: Evidence) -> tuple[int, int] | None:
    """The bracket while a size inside is still to be run."""
    low, high = evidence.bracket()
    return (low, high) if high - low > 1 else None


def checked_strategy(name: str) -> str:
    """Return the name. Raises ``ValueError`` for one that is not there."""
    if name not in STRATEGIES:
        raise ValueError(f"strategy is {name!r}; legal are {', '.join(map(repr, STRATEGIES))}")
    return name


def _strategy(name: str, predicted: Callable[[int], float] | None) -> Strategy:
    return Model(predicted) if checked_strategy(name) == "model" else Exponential()


def _checked_capacity(capacity: float) -> float:
    if isinstance(capacity, bool) or not isinstance(capacity, numbers.Real) or not float(capacity) > 0:
        raise ValueError(f"capacity is {capacity!r}; legal is a number above 0, in the unit of the peaks")
    return capacity


def _warning(evidence: Evidence, size: int) -> str | None:
    said = evidence.oddities()
    if not size:
        smallest = evidence.sizes[0]
        peak, show = evidence.peaks[smallest], evidence.show
        took = "needs more than it could get" if peak is None or math.isinf(peak) else f"needs {show(peak)}"
        capacity = show(evidence.capacity)
        said.insert(0, f"no batch size fits: {smallest}, the smallest, {took} of {capacity}")
    return "; ".join(said) or None
