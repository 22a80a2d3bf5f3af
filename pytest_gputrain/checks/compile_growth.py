"""Which graphs of a compiled loop should not have been: compiled after warm-up, and of use for one case only.

A graph in the first steps is paid for once, and so are the first evaluation's and the first look at the loss
without gradients. Later ones are growth, but where torch has made a size or a number dynamic that was a
constant: after such a graph comes no other for the same reason. Imports no torch.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from pytest_gputrain.checks.compile_loop import EVALUATE, TRAIN, WITHOUT_GRAD, Unit
from pytest_gputrain.compile.records import CompileReport, Graph, Recompile

# The second step has what the first one made (gradients, an optimizer's state); the third may find a size or
# a number changed and make it dynamic.
WARM_UP = 3
LINES = 5


@dataclass(frozen=True)
class Growth:
    """What was compiled in a unit that should not have compiled anything."""

    unit: Unit
    graphs: tuple[Graph, ...]
    recompiles: tuple[Recompile, ...]


def growth(units: list[Unit], report: CompileReport) -> list[Growth]:
    """In the order in which it came."""
    found, seen = [], set[str]()
    for unit in units:
        first = unit.index < WARM_UP if unit.phase == TRAIN else unit.index == 0 and unit.phase not in seen
        seen.add(unit.phase)
        if not first and (bad := _for_one_case(unit, report)):
            functions = {graph.function for graph in bad}
            why = tuple(r for r in report.recompiles if r.step == unit.number and r.function in functions)
            found.append(Growth(unit, bad, why))
    return found


def _for_one_case(unit: Unit, report: CompileReport) -> tuple[Graph, ...]:
    """The graphs of this unit that are of use for one case only."""
    excused = {r.compile_id for r in report.recompiles if _of_size_one(r) or _of_a_new_mode(r)}
    return tuple(
        report.graphs[index]
        for index in range(*unit.graphs)
        if not generalises(report.graphs, index) and report.graphs[index].compile_id not in excused
    )


def _of_size_one(recompile: Recompile) -> bool:
    """A dynamic size that is 0 or 1 gets a graph of its own in every torch: one more, by whoever's choice."""
    return "0/1 specialization" in recompile.reason


def _of_a_new_mode(recompile: Recompile) -> bool:
    """Every earlier graph is for gradients on, or every one for off: a step that evaluates now and then."""
    return bool(recompile.reasons) and all("grad_mode" in reason for reason in recompile.reasons)


def generalises(graphs: tuple[Graph, ...], index: int) -> bool:
    """Whether a graph takes more sizes and numbers as inputs than the one before it of the same code."""
    graph = graphs[index]
    earlier = [g for g in graphs[:index] if (g.function, g.location) == (graph.function, graph.location)]
    return bool(earlier) and len(graph.dynamic_dims) > len(earlier[-1].dynamic_dims)


def words_of(unit: Unit) -> str:
    """Where in the loop this is."""
    if unit.phase == TRAIN:
        return f"step {unit.index}"
    if unit.phase == EVALUATE:
        return f"evaluation, batch {unit.index}"
    return "the loss without gradients" if unit.phase == WITHOUT_GRAD else "saving"


def lines(found: list[Growth], units: list[Unit]) -> list[str]:
    """One for each recompile, the first few of them."""
    told = []
    for one in found:
        reasons = [(r.location, reason_of(r)) for r in one.recompiles] or [
            (one.graphs[0].location, "compiled afresh, not for a guard that failed")
        ]
        for location, reason in reasons:
            told.append(f"  {words_of(one.unit)}  {location}  {reason}{_other_shapes(one.unit, units)}")
    more = [f"  and {len(told) - LINES} more"] if len(told) > LINES else []
    return told[:LINES] + more


def reason_of(recompile: Recompile) -> str:
    """Dynamo's words, without its advice: why the earlier graph that was nearest to fit did not fit."""
    every = recompile.reasons or (recompile.reason,)
    # Of two modes, training and evaluation, one never fits; the other's reason is the one that matters.
    near = [reason for reason in every if not _MODE.search(_guard(reason))] or list(every)
    return near[0].partition(" (HINT:")[0]


def _guard(reason: str) -> str:
    """Without the user's line of code, which dynamo puts behind it: that may say anything."""
    return re.split(r"\s# ", reason, maxsplit=1)[0]


def _other_shapes(unit: Unit, units: list[Unit]) -> str:
    """Which tensor of this unit's batch is not as in the first step."""
    first = {path: (sizes, dtype) for path, sizes, dtype in units[0].shapes}
    for path, sizes, dtype in unit.shapes:
        was = first.get(path)
        if was is not None and was != (sizes, dtype):
            now, before = (sizes, was[0]) if was[0] != sizes else (dtype, was[1])
            return f"   ({unit.batch}: {path or 'the batch'} is {now}, in step 0 {before})"
    return ""


_MODE = re.compile(r"GLOBAL_STATE|grad_mode|\.training\b|no_grad")
_LIKELY: tuple[tuple[str, str], ...] = (
    (r"\['lr'\]", "the learning rate is a number, and a schedule changes it: lr=torch.tensor(...)"),
    (
        r"requires_grad mismatch",
        "a parameter is frozen or unfrozen in the loop, and each change compiles once more; do it before the "
        "loop, or expect this (expected_failures)",
    ),
    (r"grad_mode|GLOBAL_STATE", "a mode that is global (gradients, autocast, ...) is switched in the loop"),
    (r"\bis (not )?None", "an argument is None at times and a tensor at others; give the same in every step"),
    (r"dtype mismatch|expected .*Float|expected .*Long", "tensors of another type; convert to one type"),
    (r"size mismatch|stride mismatch|\.size\(\)|rank mismatch", _SIZES := "sizes"),
    (r"\.training\b", "modules are switched between training and evaluation one by one"),
    (r"^G\[|globals\(\)|\bG\['", "a global that changes is a constant of the graph; hold it in a tensor"),
)


def likely(found: list[Growth], units: list[Unit]) -> str:
    """What is probably behind the first of them, and the way out."""
    one = found[0]
    if not one.recompiles:
        return (
            "torch.compile, or torch.compiler.reset(), is called in every step; compile once, before the loop"
        )
    reason = _guard(reason_of(one.recompiles[0]))
    for pattern, words in _LIKELY:
        if re.search(pattern, reason):
            return _about_sizes(one, units) if words is _SIZES else words
    if re.search(r"==|len\(|^not |___check_obj_id|___stack", reason):
        return (
            "a number, string or object that changes from step to step is a constant of the graph; keep it "
            "in a tensor (a buffer), or out of forward"
        )
    return "something that the graph takes for a constant changes"


def _about_sizes(one: Growth, units: list[Unit]) -> str:
    if _other_shapes(one.unit, units):
        return (
            "batches of other shapes; pad them to a fixed one (batch_shapes_constant says which), drop a "
            "last batch that is short, or compile with dynamic=True"
        )
    return (
        "the batches have one shape, so model or loss cuts them to what each holds; pad to a fixed length "
        "instead"
    )
