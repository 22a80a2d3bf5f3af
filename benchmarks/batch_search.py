"""How many sizes a search runs to find the largest batch that fits, beside what others ship.

    python -m benchmarks.batch_search

The same 400 memory curves of five kinds (``_curves``) for all: our search (``strategy="model"``), the same
with a prediction that is 5 % too high, the classic doubling and bisecting, Lightning's batch size finder in
both modes and accelerate's ``find_executable_batch_size``, as installed. Counted are probes, and those that
ran out of memory; no time, because a probe of a real model costs seconds and choosing one microseconds.

Claim: on affine curves a median of 4 probes or fewer, none running out of memory twice; over all curves the
95th percentile of probes is not above that of doubling and bisecting; every answer is the exact maximum.
"""

from __future__ import annotations

import functools
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks import _search_rivals as rivals
from benchmarks._curves import KINDS, LIMIT, Curve, curves
from benchmarks._harness import options, scratch, write
from pytest_gputrain.batch.search import find_maximum

CURVES = 80  # of each kind
TOO_HIGH = 1.05  # what a prediction without the hardware is allowed to be wrong by
OURS, SEEDED, CLASSIC = "model", "model, predicted", "exponential"


@dataclass(frozen=True)
class Search:
    """What one search did: sizes run, those that ran out of memory, and by what share the answer is short."""

    probes: int
    ooms: int
    short: float


Finder = Callable[[Curve], tuple[int, rivals.Trials]]


def ours(curve: Curve, strategy: str = "model", too_high: float | None = None) -> tuple[int, rivals.Trials]:
    """Search with this package, on a machine that tells no peak when memory runs out."""
    trials: rivals.Trials = []

    def probe(batch_size: int) -> int | None:
        peak = curve.peak(batch_size)
        trials.append((batch_size, peak <= curve.capacity))
        return peak if trials[-1][1] else None

    factor = too_high or 1.0
    result = find_maximum(
        probe, maximum=LIMIT, capacity=curve.capacity, strategy=strategy,
        predicted=(lambda batch_size: factor * curve.peak(batch_size)) if too_high else None,
    )  # fmt: skip
    return result.size, trials


def finders(folder: Path) -> dict[str, Finder]:
    """Return every way of searching, by name."""
    return {
        OURS: ours,
        SEEDED: functools.partial(ours, too_high=TOO_HIGH),
        CLASSIC: functools.partial(ours, strategy="exponential"),
        "lightning power": functools.partial(rivals.lightning, mode="power", folder=folder),
        "lightning binsearch": functools.partial(rivals.lightning, mode="binsearch", folder=folder),
        "accelerate": rivals.accelerate,
    }


def search(finder: Finder, curve: Curve) -> Search:
    """Run one search. Raises AssertionError when the answer is above the exact maximum."""
    size, trials = finder(curve)
    assert size <= curve.exact, f"{size} does not fit: {curve}"
    return Search(len(trials), sum(not fits for _, fits in trials), (curve.exact - size) / curve.exact)


def percentile_95(numbers: Sequence[float]) -> float:
    """Return the smallest of the numbers that 95 % of them do not exceed."""
    return sorted(numbers)[-(len(numbers) // 20) - 1]


def summary(searches: Sequence[Search]) -> dict[str, float]:
    """Return the figures of one way on one kind of curve, as plain JSON."""
    probes, ooms = [one.probes for one in searches], [one.ooms for one in searches]
    return {
        "curves": len(searches),
        "probes_median": statistics.median(probes),
        "probes_p95": percentile_95(probes),
        "probes_max": max(probes),
        "ooms_median": statistics.median(ooms),
        "ooms_max": max(ooms),
        "short_median": round(statistics.median(one.short for one in searches), 4),
        "short_max": round(max(one.short for one in searches), 4),
        "exact": sum(one.short == 0 for one in searches),
    }


def table(measured: dict[str, dict[str, dict[str, float]]]) -> str:
    """One line a kind and way: probes, those out of memory, how far the answers stay below the exact ones."""
    lines = [f"{'':36}   probes med/p95/max   OOM med/max   short med/max    exact"]
    for kind, ways in measured.items():
        for way, row in ways.items():
            probes = f"{row['probes_median']:g} / {row['probes_p95']:g} / {row['probes_max']:g}"
            ooms = f"{row['ooms_median']:g} / {row['ooms_max']:g}"
            short = f"{row['short_median']:.0%} / {row['short_max']:.0%}"
            exact = f"{row['exact']:g}/{row['curves']:g}"
            lines.append(f"{kind:15} {way:20}{probes:>21}{ooms:>14}{short:>16}{exact:>9}")
    return "\n".join(lines)


def measure(count: int) -> dict[str, dict[str, dict[str, float]]]:
    """Return the summaries by kind of curve, "all" among them, and by way of searching."""
    with scratch() as folder, rivals.quiet():
        ways = finders(folder)
        done = {
            kind: {
                way: [search(finder, curve) for curve in curves(kind, count)] for way, finder in ways.items()
            }
            for kind in KINDS
        }
    done["all"] = {way: [one for kind in KINDS for one in done[kind][way]] for way in ways}
    return {kind: {way: summary(found) for way, found in row.items()} for kind, row in done.items()}


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and report. Returns 0 when the claim holds; a quick run proves nothing."""
    given = options(__doc__, argv)
    measured = measure(2 if given.quick else CURVES)
    print(table(measured))
    affine, everything = measured["affine"][OURS], measured["all"]
    figures: dict[str, float | str] = {
        "affine, median probes": affine["probes_median"],
        "affine, most out-of-memory": affine["ooms_max"],
        "all, 95th percentile of probes": everything[OURS]["probes_p95"],
        "all, 95th percentile of exponential": everything[CLASSIC]["probes_p95"],
        "exact answers": f"{everything[OURS]['exact']:g} of {everything[OURS]['curves']:g}",
    }
    write("batch_search", figures, measured, given.results)
    holds = (
        affine["probes_median"] <= 4
        and affine["ooms_max"] <= 1
        and everything[OURS]["probes_p95"] <= everything[CLASSIC]["probes_p95"]
        and everything[OURS]["short_max"] == 0
    )
    return 0 if holds or given.quick else 1


if __name__ == "__main__":
    sys.exit(main())
