"""Batches of several shapes through the compiled model: does each cost a compilation?

In a rank, and by dynamo alone: what it compiles anew it would compile anew for every backend.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from pytest_gputrain.case import TrainingCase, pytree
from pytest_gputrain.case.loading import describe
from pytest_gputrain.checks.compile_growth import generalises
from pytest_gputrain.checks.context import CheckContext

BACKEND = "eager"
# The usual batch twice: what the second step compiles is not for another shape.
USUAL = 2


def try_shapes(case: TrainingCase, ctx: CheckContext, batches: list[Any]) -> tuple[str, list[str]]:
    """Why shapes that vary do no harm ("" where they do), and lines on what compiling made of them.

    batches: the first is as usual, the others are different from it and from each other.
    """
    from pytest_gputrain.checks.compile_context import backend_of
    from pytest_gputrain.checks.compile_session import build_compiled
    from pytest_gputrain.checks.session import device_of, seed_for, take_step
    from pytest_gputrain.compile.monitor import compile_monitor

    others, usual = len(batches) - 1, 0
    with backend_of(replace(ctx, compile_backend=BACKEND)), compile_monitor() as monitor:
        built = build_compiled(case, ctx)
        for index, batch in enumerate([batches[0]] * USUAL + batches[1:]):
            if index == USUAL:
                usual = len(monitor.graphs)
            placed = pytree.map_tensors(lambda tensor: tensor.to(device_of(ctx), copy=True), batch)
            try:
                take_step(case, built.compiled, built.optimizer, [placed], seed_for(ctx, index))
            except Exception as error:
                return "", [f"a step on another shape raises {describe(error)}"] if index >= USUAL else []
        report = monitor.report()
    if not report.graph_runs:
        return "", []  # nothing is compiled: that is for compile_no_recompiles to tell
    added = range(usual, len(report.graphs))
    constant = [index for index in added if not generalises(report.graphs, index)]
    if not constant and not report.limit_hits:
        return _why(bool(added), any(graph.dynamic_dims for graph in report.graphs)), []
    graphs = "1 more graph" if len(constant) == 1 else f"{len(constant)} more graphs"
    return "", [f"compiled anew for other shapes: {graphs} for {others} of them"]


def _why(compiled_again: bool, dynamic: bool) -> str:
    if compiled_again:
        return "torch makes the graph dynamic, once"
    return "the graph is dynamic" if dynamic else "the compiled model is not compiled anew for that"
