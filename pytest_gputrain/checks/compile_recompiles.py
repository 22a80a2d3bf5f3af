"""Does a compiled loop stay compiled? Training, evaluation, a checkpoint and toggles, watched by the monitor.

Answers by graphs that ran and graphs that were compiled, not by what the model is wrapped in. One process.
Does not see what happens later than in some 30 steps, nor ranks that compile at different steps.
"""

from __future__ import annotations

import re
from statistics import median

from pytest_gputrain.case import TrainingCase
from pytest_gputrain.checks.compile_growth import LINES, WARM_UP, growth, likely, lines, reason_of, words_of
from pytest_gputrain.checks.compile_loop import TRAIN, Loop, Unit, run_loop
from pytest_gputrain.checks.context import CheckContext
from pytest_gputrain.checks.ranks import alone
from pytest_gputrain.checks.registry import check
from pytest_gputrain.checks.result import CheckFailed, Figures
from pytest_gputrain.compile.records import CompileReport, GraphBreak
from pytest_gputrain.report.metrics import once
from pytest_gputrain.report.series import series

BRIEF = 160
# What waits for the device in the middle of forward, or cannot be in a graph at all: seldom meant.
_COSTLY = re.compile(
    r"Tensor\.item|tolist|local_scalar_dense|`print`|ata-dependent branching|Data dependent operator|numpy"
)


@check("compile_no_recompiles", subject="compile")
def check_compile_no_recompiles(case: TrainingCase, ctx: CheckContext) -> Figures:
    """Fails when nothing compiled runs, graphs grow after warm-up, or torch falls back to eager."""
    loop: Loop = alone(run_loop, case, ctx, doing="training the compiled model")
    report = loop.report
    assert report is not None
    steps = [unit for unit in loop.units if unit.phase == TRAIN]
    figures: Figures = {
        "steps": len(steps),
        "graphs": len(report.graphs),
        "recompiles": len(report.recompiles),
        "graph breaks": len(report.breaks),
        "seconds compiling": round(report.compile_seconds, 2),
        "series": [_by_unit(loop, report)],
        "metrics": {
            "compile_cpu_seconds": once(_cpu_seconds(loop.units), unit="s", better="lower"),
            "graphs": once(len(report.graphs), unit="graphs", better="lower", spread=0.0),
        },
    }
    _judge_errors(report, loop.units, figures)
    _judge_growth(loop, report, figures)
    _judge_runs(loop, report, steps, figures)
    _judge_breaks(report, figures)
    notes = [loop.left_out] if loop.left_out else []
    return {**figures, "notes": notes + _notes(report)}


def _by_unit(loop: Loop, report: CompileReport) -> Figures:
    """Graphs compiled, the first ones too, by unit of the loop: steps, evaluation and saving in turn."""
    made = dict.fromkeys((unit.number for unit in loop.units), 0)
    for graph in report.graphs:
        if graph.step is not None:
            made[graph.step] = made.get(graph.step, 0) + 1
    return series(
        "recompiles", "graphs by step, evaluation or save", [*made.values()], x=[*made], unit="graphs"
    )


def _cpu_seconds(units: list[Unit]) -> float:
    """Of the units that compile, beyond what others take: unlike the clock's it hardly knows neighbours."""
    plain = [unit.cpu_seconds for unit in units if unit.graphs[0] == unit.graphs[1]]
    usual = median(plain) if plain else 0.0
    return sum(max(0.0, u.cpu_seconds - usual) for u in units if u.graphs[0] != u.graphs[1])


def _judge_errors(report: CompileReport, units: list[Unit], figures: Figures) -> None:
    """Raises CheckFailed where torch has swallowed an error and runs eager instead."""
    swallowed = [error for error in report.suppressed if error.swallowed_by == "torch"]
    if swallowed:
        first = swallowed[0]
        raise CheckFailed(
            f"torch runs eager after an error that it does not tell, in {first.function}   at "
            f"{first.location}: {first.message}\n"
            "  likely: torch._dynamo.config.suppress_errors is on; turn it off and mend what it hides",
            figures,
        )


def _judge_growth(loop: Loop, report: CompileReport, figures: Figures) -> None:
    found = growth(loop.units, report)
    if report.limit_hits:
        hit = report.limit_hits[0]
        # The limit is counted by code, which may be named otherwise than its graphs (within decorators).
        of = sum(graph.function == hit.function for graph in report.graphs) or len(report.graphs)
        where = next((words_of(u) for u in loop.units if u.number == hit.step), "the first step")
        graphs = "1 graph" if of == 1 else f"{of} graphs"
        head = f"{graphs}, then torch ran eager (recompile limit {hit.limit}) from {where} on"
    elif found:
        bad = sum(len(one.graphs) for one in found)
        head = (
            f"{bad} of {len(report.graphs)} graphs were compiled after warm-up ({WARM_UP} steps), the first "
            f"in {words_of(found[0].unit)}"
        )
    else:
        return
    told = lines(found, loop.units) or [f"  {r.location}  {reason_of(r)}" for r in report.recompiles[:3]]
    told = told or [f"  {hit.function}   at {hit.location}" for hit in report.limit_hits[:3]]
    why = [f"  likely: {likely(found, loop.units)}"] if found else [f"  likely: {_LOW_LIMIT}"]
    raise CheckFailed("\n".join([head, *told, *why]), {**figures, "growth": len(found)})


def _judge_runs(loop: Loop, report: CompileReport, steps: list[Unit], figures: Figures) -> None:
    """Raises CheckFailed where steps run nothing that is compiled."""
    idle = [unit.index for unit in steps if not unit.runs]
    if not idle and loop.is_itself and not any(graph.parameters for graph in report.graphs):
        of = ", ".join(sorted({graph.function for graph in report.graphs})[:3])
        raise CheckFailed(
            "the model runs eager: compile(model) returned the model itself, and no compiled graph has a "
            f"parameter in it; they are of {of}\n"
            f"  likely: {_NOT_COMPILED}",
            figures,
        )
    if not idle:
        return
    whole = next((found for found in report.breaks if found.skipped and not found.in_torch), None)
    if whole is not None and not report.suppressed:
        often = (
            "no graph ran"
            if len(idle) == len(steps)
            else f"no graph ran in {len(idle)} of {len(steps)} steps"
        )
        raise CheckFailed(
            f"torch leaves {whole.function} uncompiled, for a graph break after which it cannot go on, "
            f"and {often}   at {whole.location}: {_brief(whole)}\n"
            "  likely: the break is in a loop or a with; take it out of there, or compute with the tensor "
            "(torch.where)",
            figures,
        )
    if len(idle) < len(steps):
        raise CheckFailed(
            f"no compiled graph ran in {len(idle)} of {len(steps)} steps, the first of them step {idle[0]}\n"
            "  likely: the step calls the original model there, or replaces what is compiled",
            figures,
        )
    if report.suppressed:
        first = report.suppressed[0]
        raise CheckFailed(
            f"nothing compiled runs: compiling {first.function} fails, and {first.swallowed_by} goes on "
            f"without   at {first.location}: {first.message}\n"
            "  likely: an except around the call hides it, and calls the original; let it raise, and mend it",
            figures,
        )
    what = "the model itself" if loop.is_itself else "another object"
    raise CheckFailed(
        f"nothing compiled runs: no graph ran in {len(steps)} steps; compile(model) returned {what}\n"
        f"  likely: {_NOT_COMPILED if loop.is_itself else _NOT_CALLED}",
        figures,
    )


_LOW_LIMIT = "recompile_limit is lower than what the first steps need (shapes, gradients on and off)"
_NOT_COMPILED = (
    "it does not compile, or catches the error and returns the model; return torch.compile(model), or model "
    "after model.compile()"
)
_NOT_CALLED = (
    "step or loss calls the original model (a closure, model._orig_mod) instead of what it is given, or "
    "forward is excluded (torch.compiler.disable)"
)


def _judge_breaks(report: CompileReport, figures: Figures) -> None:
    """Raises CheckFailed where forward waits for a value, or prints, in the middle."""
    costly = list({(b.location, b.reason): b for b in report.breaks if _COSTLY.search(b.reason)}.values())
    if not costly:
        return
    number = "a graph break" if len(costly) == 1 else f"{len(costly)} graph breaks"
    others = [f"  and at {found.location}: {_brief(found)}" for found in costly[1:LINES]]
    raise CheckFailed(
        f"{number} in what is compiled, at {costly[0].location}: {_brief(costly[0])}\n"
        + "\n".join(
            [
                *others,
                "  likely: forward reads a tensor's value (.item(), if, print); do that outside "
                "of what is compiled, or compute with the tensor (torch.where)",
            ]
        ),
        figures,
    )


def _brief(found: GraphBreak) -> str:
    """The reason in a few words: what dynamo calls it, and of its explanation as much as a line holds."""
    reason = found.reason.removeprefix("Graph Break Reason: ")
    return reason if len(reason) <= BRIEF else f"{reason[: BRIEF - 3]}..."


def _notes(report: CompileReport) -> list[str]:
    others = {(found.location, found.reason): found for found in report.breaks}.values()
    told = [f"graph break at {found.location}: {_brief(found)}" for found in others]
    return [*told[:LINES], *report.notes]
