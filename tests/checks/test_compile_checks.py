"""Bad input of the compile checks, in one line; what decides whether a graph is growth."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from pytest_gputrain.case import CaseError
from pytest_gputrain.checks import CheckResult, run_checks
from pytest_gputrain.checks.compile_growth import Growth, generalises, growth, likely, reason_of
from pytest_gputrain.checks.compile_loop import Unit
from pytest_gputrain.checks.made_by import named, watched_loaders, who_makes
from pytest_gputrain.compile.records import CompileReport, Graph, Recompile
from tests.planted import broken_compile_shapes as planted
from tests.planted.plant import case, draw

pytestmark = pytest.mark.skipif("sys.platform != 'linux'", reason="launching ranks needs Linux")


def shapes_check(**fields: Any) -> CheckResult:
    (result,) = run_checks(case("tiny", **fields), checks=["batch_shapes_constant"])
    return result


def test_unknown_backend_is_one_line_before_any_check() -> None:
    ran: list[CheckResult] = []
    with pytest.raises(CaseError) as raised:
        run_checks(case("tiny"), compile_backend="inductr", on_result=ran.append)
    line = str(raised.value)
    assert line.startswith(f"unknown compile backend 'inductr'; torch {torch.__version__} has aot_eager, ")
    assert "\n" not in line
    assert not ran


def test_empty_batches_are_told() -> None:
    result = shapes_check(batches=lambda: iter(()))
    assert (result.outcome, result.message) == (
        "failed",
        "batches() gave no batch; it has to give the data of one epoch or more, from its beginning at each "
        "call",
    )


def test_batches_that_are_none_are_told() -> None:
    result = shapes_check(batches=lambda: None)
    assert result.message == (
        "batches() returned None; it has to return an iterable of batches (a DataLoader, a generator, a list)"
    )


def test_a_batch_without_tensors_is_told() -> None:
    result = shapes_check(batches=lambda: [draw(4, "cpu"), "text"])
    assert result.message == "batch 1 of batches() has no tensor, it is 'text'; give what the loop trains on"


def endless() -> Iterator[Any]:
    while True:
        yield draw(4, "cpu")


def test_an_endless_stream_is_drawn_from_for_a_while() -> None:
    result = shapes_check(batches=endless)
    assert result.outcome == "passed"
    assert 4 <= result.figures["batches"] <= 2000


def test_no_compiler_for_inductor_is_skipped_with_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", os.devnull)
    (result,) = run_checks(case("tiny"), checks=["compile_no_recompiles"], compile_backend="inductor")
    assert result.outcome == "skipped"
    assert result.message.startswith("inductor needs a C++ compiler, and there is none on the PATH")
    assert "apt install g++" in result.message


def test_what_compile_returns_has_to_be_callable() -> None:
    nothing = case("tiny", compile=lambda model: model.compile())
    (result,) = run_checks(nothing, checks=["compile_no_recompiles"])
    assert (result.outcome, result.message) == (
        "failed",
        "compile(model) returned None; it has to return what the loop calls: torch.compile(model), or the "
        "model itself after model.compile()",
    )


def graph(*dims: str, function: str = "forward") -> Graph:
    return Graph(
        compile_id="0/0",
        function=function,
        location="model.py:1 in forward",
        step=0,
        phase="train",
        seconds=0.1,
        ops=3,
        backend="eager",
        dynamic_dims=dims,
    )


def unit(number: int, graphs: tuple[int, int], phase: str = "train") -> Unit:
    return Unit(number, phase, number, "batch 0", (), graphs, 1)


def test_a_graph_that_takes_more_as_inputs_is_no_growth() -> None:
    graphs = (graph(), graph("x.size(0)"), graph("x.size(0)"), graph("n", function="other"))
    assert [generalises(graphs, index) for index in range(4)] == [False, True, False, False]


def test_growth_begins_after_warm_up() -> None:
    report = CompileReport(graphs=tuple(graph() for _ in range(4)))
    units = [unit(0, (0, 1)), unit(1, (1, 2)), unit(2, (2, 3)), unit(3, (3, 4))]
    (found,) = growth(units, report)
    assert found.unit.number == 3


def test_the_first_evaluation_is_free_and_the_second_is_not() -> None:
    report = CompileReport(graphs=(graph(), graph(), graph()))
    units = [
        unit(0, (0, 1)),
        Unit(1, "eval", 0, "batch 0", (), (1, 2), 1),
        Unit(2, "eval", 1, "batch 1", (), (2, 2), 1),
        Unit(3, "eval", 0, "batch 0", (), (2, 3), 1),
    ]
    (found,) = growth(units, report)
    assert found.unit.number == 3


def test_the_reason_is_not_that_of_the_other_mode() -> None:
    recompile = Recompile(
        compile_id="0/2",
        function="forward",
        location="model.py:1 in forward",
        called_from=None,
        reason="GLOBAL_STATE changed: grad_mode",
        reasons=("GLOBAL_STATE changed: grad_mode", "self.calls == 3 (HINT: torch says more)"),
        step=5,
        phase="train",
        number=2,
    )
    assert reason_of(recompile) == "self.calls == 3"


def advice_for(reason: str) -> str:
    """On a graph that was compiled anew in step 5 for it."""
    recompile = Recompile(
        compile_id="0/1",
        function="forward",
        location="model.py:1 in forward",
        called_from=None,
        reason=reason,
        reasons=(reason,),
        step=5,
        phase="train",
        number=1,
    )
    return likely([Growth(unit(5, (1, 2)), (graph(),), (recompile,))], [unit(0, (0, 1))])


def test_the_users_code_behind_a_guard_gives_no_advice() -> None:
    reason = "self.calls == 3  # loss = loss * self.calls if loss is not None else None"
    assert advice_for(reason).startswith("a number, string or object that changes")


def test_a_parameter_that_is_unfrozen_is_told_as_that() -> None:
    reason = (
        "tensor 'self._parameters['bias']' requires_grad mismatch. expected requires_grad=0. Guard failed"
    )
    assert advice_for(reason).startswith("a parameter is frozen or unfrozen in the loop")


def test_who_makes_batches() -> None:
    with watched_loaders() as loaders:
        list(planted.padded_to_longest())
    line = planted.pad_to_longest.__code__.co_firstlineno
    assert who_makes(case("tiny"), loaders) == (
        f"collate function pad_to_longest (broken_compile_shapes.py:{line})"
    )
    assert who_makes(case("tiny", batches=endless), []).startswith("batches(), endless (test_compile_checks")
    assert who_makes(case("tiny"), []).startswith("batch(), draw (plant.py:")
    assert named(len) == "len"
