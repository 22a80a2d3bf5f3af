"""The words of a report."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from pytest_gputrain.compile.records import (
    BackendError,
    CompileReport,
    Graph,
    GraphBreak,
    LimitHit,
    Recompile,
    StepFigures,
)

PLACE: dict[str, Any] = {"function": "Model.forward", "location": "train.py:7 in forward", "phase": "train"}
GRAPH = Graph(**PLACE, compile_id="0/0", step=0, seconds=1.25, ops=12, backend="inductor", cached=True)
RECOMPILE = Recompile(
    **PLACE,
    compile_id="0/1",
    step=4,
    called_from="train.py:30 in main",
    reason="tensor 'x' size mismatch at index 0. expected 4, actual 3",
    reasons=(),
    number=1,
)
BREAK = GraphBreak(**PLACE, compile_id="0/0", step=None, reason="Tensor.item()", skipped=True)
HIT = LimitHit(**PLACE, kind="recompile_limit", limit=8, reason="self.n == 8", step=9)
ERROR = BackendError(**PLACE, message="RuntimeError: boom", swallowed_by="torch", step=0)
GOOD = CompileReport(
    graphs=(GRAPH,),
    steps=(
        StepFigures(step=0, phase="train", graph_runs=1, compile_seconds=1.25),
        StepFigures(step=1, phase="train", graph_runs=1),
        StepFigures(step=1, phase="eval"),
    ),
    cache_hits=1,
    compile_seconds=1.25,
)


def test_compiled() -> None:
    assert str(GOOD) == ("compiled: 1 graph in 1.2 s, run 2 times; 0 recompiles, 0 graph breaks, 1 cache hit")
    assert GOOD.graph_runs_by_step == {0: 1, 1: 1} and GOOD.compile_seconds_by_step == {0: 1.25, 1: 0.0}


def test_what_is_wrong_in_the_order_of_its_weight() -> None:
    report = replace(
        GOOD,
        recompiles=(RECOMPILE,),
        breaks=(BREAK,),
        limit_hits=(HIT,),
        suppressed=(ERROR,),
        notes=("TORCHDYNAMO_DISABLE=1 switches torch.compile off",),
    )
    assert str(report).splitlines() == [
        "NOT compiled: recompile_limit was hit, and what fits no graph runs eager since (1 graph in 1.2 s, "
        "run 2 times; 1 recompile, 1 graph break, 1 cache hit)",
        "  recompile_limit (8) hit by Model.forward in train step 9: self.n == 8   at train.py:7 in forward",
        "  failed compilation, swallowed by torch in train step 0: RuntimeError: boom"
        "   at train.py:7 in forward",
        "  recompile 1 of Model.forward in train step 4: tensor 'x' size mismatch at index 0. expected 4, "
        "actual 3   at train.py:7 in forward",
        "  graph break (function skipped): Tensor.item()   at train.py:7 in forward",
        "  note: TORCHDYNAMO_DISABLE=1 switches torch.compile off",
    ]


def test_steps_in_eager_are_listed() -> None:
    eager = tuple(StepFigures(step=step, phase="train") for step in range(2, 14))
    assert str(replace(GOOD, steps=(*GOOD.steps, *eager))).splitlines() == [
        "NOT compiled: no compiled graph ran in some of the steps (1 graph in 1.2 s, run 2 times; "
        "0 recompiles, 0 graph breaks, 1 cache hit)",
        "  no compiled graph ran in 12 steps: 2, 3, 4, 5, 6, 7, 8, 9, …",
    ]
    assert str(CompileReport()).startswith(
        "NOT compiled: no graph was captured (0 graphs in 0.0 s, run 0 times;"
    )
    assert str(CompileReport(graphs=(GRAPH,))).startswith(
        "NOT compiled: no compiled graph ran (1 graph in 0.0 s"
    )
    assert str(replace(GOOD, suppressed=(ERROR,))).startswith(
        "NOT compiled: a failed compilation was swallowed by torch ("
    )


def test_many_of_a_kind_are_cut() -> None:
    lines = str(replace(GOOD, recompiles=(RECOMPILE,) * 11)).splitlines()
    assert len(lines) == 1 + 8 + 1 and lines[-1] == "  … and 3 more recompiles"
