"""What fixtures measured, for the report that is being recorded: a search's ladder, what was compiled when.

Nothing where no report is recorded, as on a rank.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pytest_gputrain.batch.finder import BatchFinder
from pytest_gputrain.checks.context import SESSION_FIGURES
from pytest_gputrain.report.series import series

if TYPE_CHECKING:
    from pytest_gputrain.batch.discovered import Discovered
    from pytest_gputrain.compile.records import CompileReport


class TellingFinder(BatchFinder):
    """A ``BatchFinder`` whose searches are in the test's report."""

    def __call__(self, *args: Any, **settings: Any) -> Discovered:
        found = super().__call__(*args, **settings)
        if (tell := SESSION_FIGURES.get()) is not None:
            tell({"series": [ladder_of(found)]})
        return found


def ladder_of(found: Discovered) -> dict[str, Any]:
    """Every size tried, with its peak, None where memory ran out; the limit that was searched against."""
    tried = sorted({**found.known, **dict(found.search.probes)}.items())
    label = f"peak; {found.size} is the largest that trains" if found.size else "peak; nothing fits"
    sizes, peaks = [size for size, _ in tried], [peak for _, peak in tried]
    return series(
        "ladder", label, peaks, x=sizes, unit="bytes", limit=found.limit, limit_label="memory limit"
    )


def tell_compiled(report: CompileReport) -> None:
    """Graphs compiled by step of training; nothing for a monitor that was told no steps."""
    tell = SESSION_FIGURES.get()
    steps = sorted({one.step for one in report.steps if one.step is not None and one.phase == "train"})
    if tell is None or not steps:
        return
    made = dict.fromkeys(steps, 0)
    for graph in report.graphs:
        if graph.step in made and graph.phase == "train":
            made[graph.step] += 1
    tell({"series": [series("recompiles", "graphs compiled", [*made.values()], x=steps, unit="graphs")]})
