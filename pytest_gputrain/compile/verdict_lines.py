"""The lines of ``validation`` about compiling: is it compiled, does it stay so, and why not."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pytest_gputrain.compile.monitor import CompileMonitor
    from pytest_gputrain.compile.records import CompileReport, Recompile

TRAIN, BETWEEN = "train", "between steps"
RIGHT, WRONG = "✓", "✗"
_LAST_LOOK = 20  # steps: a loop that has compiled nothing by then is judged again at its end only
_MOST_NAMES = 3  # of compiled functions
_MOST_RECOMPILES = 8  # that are told as they happen


class VerdictLines:
    """Reads a monitor whose steps are told, and says each thing once."""

    def __init__(self, monitor: CompileMonitor) -> None:
        self._monitor = monitor
        self._first: int | None = None  # the step in which compiled graphs ran first
        self._told_why: str | None = None
        self._num_recompiles = 0
        self._gave_up = False

    def after_step(self, number: int) -> list[str]:
        """What step ``number`` has to say."""
        return [*self._verdict(number), *self._recompiled(), *self._given_up()]

    def at_the_end(self, warmup: int) -> list[str]:
        """What the whole run has to say. warmup: steps that are in no average."""
        report = self._monitor.report()
        lines = self._recompiled()  # what evaluation has compiled since the last step
        if self._first is None and self._told_why is None:
            lines.append(_not_compiled(_why(report)))
        if self._first is not None and (eager := report.eager_steps(after_step=self._first)):
            lines.append(
                f"{WRONG} No compiled graph ran in {len(eager)} later steps, first in step {eager[0]}"
            )
        return [*lines, _counts(report, warmup)]

    def figures(self) -> dict[str, Any]:
        """``is_compiled``: since the first step that was, in every one. Counts of graphs and recompiles."""
        report = self._monitor.report()
        stayed = self._first is not None and not report.eager_steps(after_step=self._first)
        return {
            "is_compiled": stayed and not report.limit_hits and not report.suppressed,
            "graphs": len(report.graphs),
            "recompiles": len(report.recompiles),
            "graph_breaks": len(report.breaks),
            "compile_seconds": report.compile_seconds,
        }

    def _verdict(self, number: int) -> list[str]:
        if self._first is not None or number > _LAST_LOOK:
            return []
        report = self._monitor.report()
        ran = report.graph_runs_by_step.get(number) and not report.suppressed
        if ran and any(graph.parameters for graph in report.graphs):
            self._first = number
            return [f"{RIGHT} Model is compiled"]
        why = f"only {_names(report)} was, which takes no parameter of it" if ran else _why(report)
        lines = [] if why == self._told_why else [_not_compiled(why)]
        self._told_why = why
        return lines

    def _recompiled(self) -> list[str]:
        new = self._monitor.recompiles[self._num_recompiles :]
        told = new[: max(0, _MOST_RECOMPILES - self._num_recompiles)]
        self._num_recompiles += len(new)
        return [_recompile(found) for found in told]

    def _given_up(self) -> list[str]:
        if self._gave_up or not (hits := self._monitor.limit_hits):
            return []
        self._gave_up = True
        hit = hits[0]
        return [
            f"{WRONG} Model is not compiled any more: {hit.function} was compiled {hit.limit} times, the "
            f"limit; what is new runs eager from step {hit.step} on ({hit.location}): {hit.reason}"
        ]


def _not_compiled(why: str) -> str:
    return f"{WRONG} Model is not compiled: {why}"


def _recompile(found: Recompile) -> str:
    """Wrong in a later step of training: the first compiles all, and evaluation may have its own graph."""
    text = f"Recompiled {found.function} ({found.location}): {found.reason}"
    if found.phase != TRAIN:
        return f"After step {found.step} | {text}"
    return f"{WRONG + ' ' if found.step else ''}Step {found.step} | {text}"


def _names(report: CompileReport) -> str:
    names = list(dict.fromkeys(graph.function for graph in report.graphs))
    return ", ".join(names[:_MOST_NAMES]) + (", …" if len(names) > _MOST_NAMES else "")


def _counts(report: CompileReport, warmup: int) -> str:
    of = f" ({_names(report)})" if report.graphs else ""
    late = sum(
        figures.compile_seconds
        for figures in report.steps
        if figures.phase == TRAIN and figures.step is not None and figures.step >= warmup
    )
    return (
        f"Graphs: {len(report.graphs)}{of} | Recompiles: {len(report.recompiles)} | "
        f"Graph breaks: {len(report.breaks)} | Compiling: {report.compile_seconds:.1f}s"
        + (f", {late:.1f}s of it after warm-up" if late else "")
    )


def _why(report: CompileReport) -> str:
    """The reason in a few words, of a run in which no compiled graph ran, or not what should."""
    if report.suppressed:
        failed = report.suppressed[0]
        return f"compiling {failed.function} failed, and it runs eager ({failed.location}): {failed.message}"
    if report.graphs:
        return "graphs were compiled, and none of them ran"
    if report.breaks:
        found = report.breaks[0]
        return f"no graph, because of a break ({found.location}): {found.reason}"
    return "nothing was compiled; call torch.compile, and train with what it returns"
