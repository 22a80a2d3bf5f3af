"""``compile_monitor`` on real compilations, with dynamo's "eager" backend where none is asked for."""

from __future__ import annotations

import inspect
import json
import pickle
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from pytest_gputrain import compile_monitor
from pytest_gputrain.compile.monitor import CompileMonitor


class Model(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(4, 4)
        self.scale = 1

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        output: torch.Tensor = self.linear(x) * self.scale
        return output


class Counting(Model):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.scale += 1
        return super().forward(x)


class Breaking(Model):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        output = super().forward(x)
        if output.sum().item() > 1e9:
            output = output + 1
        return output.relu()


class Skipped(Model):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for _ in range(2):
            with torch.no_grad():
                torch._dynamo.graph_break()
        return x + 1


def train(model: Any, sizes: Sequence[int], monitor: CompileMonitor) -> None:
    for step, size in enumerate(sizes):
        monitor.step(step)
        model(torch.ones(size, 4, requires_grad=True)).sum().backward()


def line(model: type, text: str) -> str:
    lines, first = inspect.getsourcelines(model)
    number = first + next(index for index, source in enumerate(lines) if text in source)
    return f"{Path(__file__).relative_to(Path.cwd())}:{number} in forward"


def failing(_module: Any, _inputs: Any) -> Any:
    raise RuntimeError("no such instruction")


def test_one_graph_that_runs_in_each_step() -> None:
    with compile_monitor() as monitor:
        train(torch.compile(Model(), backend="aot_eager"), [2, 2, 2], monitor)
    (graph,) = monitor.graphs
    assert (graph.function, graph.backend, graph.step, graph.ops) == ("Model.forward", "aot_eager", 0, 2)
    assert graph.location == line(Model, "def forward")
    assert monitor.graph_runs_by_step == {0: 1, 1: 1, 2: 1}
    assert monitor.is_compiled() and monitor.is_compiled(after_step=1)
    assert not monitor.is_compiled(after_step=2)
    assert monitor.compile_seconds_by_step[0] == monitor.compile_seconds >= graph.seconds > 0
    assert monitor.report().notes == ()


def test_a_report_goes_through_pickle_and_json() -> None:
    with compile_monitor() as monitor:
        train(torch.compile(Breaking(), backend="eager"), [2, 3], monitor)
    report = monitor.report()
    assert pickle.loads(pickle.dumps(report)) == report
    document = json.loads(report.to_json())
    assert document["is_compiled"] is True and document["graph_runs"] == 4
    assert str(report) == str(monitor)


def test_a_recompile_has_dynamos_reason_and_the_users_line() -> None:
    with compile_monitor() as monitor:
        train(torch.compile(Model(), backend="eager", dynamic=False), [2, 3, 4], monitor)
    first, second = monitor.recompiles
    assert first.reason == "tensor 'x' size mismatch at index 0. expected 2, actual 3"
    assert (first.step, first.number, first.function) == (1, 1, "Model.forward")
    assert first.called_from is not None and first.called_from.endswith(" in train")
    assert (second.step, second.number) == (2, 2) and len(second.reasons) == 2


def test_a_size_that_dynamo_makes_dynamic_is_named() -> None:
    with compile_monitor() as monitor:
        train(torch.compile(Model(), backend="eager"), [2, 3, 4, 5], monitor)
    assert [graph.dynamic_dims for graph in monitor.graphs] == [(), ("L['x'].size()[0]",)]
    assert len(monitor.recompiles) == 1 and monitor.is_compiled()


def test_the_recompile_limit_is_told_once_and_is_not_compiled() -> None:
    with compile_monitor() as monitor:
        torch._dynamo.config.recompile_limit = 3
        train(torch.compile(Counting(), backend="eager"), [2] * 6, monitor)
    (hit,) = monitor.limit_hits
    assert (hit.kind, hit.limit, hit.function, hit.step, hit.raised) == (
        "recompile_limit",
        3,
        "Counting.forward",
        3,
        False,
    )
    assert "self.scale += 1" in hit.reason and "HINT" not in hit.reason
    assert hit.location == line(Counting, "self.scale += 1")
    assert monitor.report().eager_steps() == [3, 4, 5]
    assert not monitor.is_compiled() and len(monitor.recompiles) == 2
    assert torch._dynamo.config.recompile_limit == 8


def test_the_accumulated_limit_too() -> None:
    with compile_monitor() as monitor:
        torch._dynamo.config.accumulated_recompile_limit = 2
        train(torch.compile(Model(), backend="eager", dynamic=False), [2, 3, 4], monitor)
    assert [(hit.kind, hit.limit) for hit in monitor.limit_hits] == [("accumulated_recompile_limit", 2)]


@pytest.mark.parametrize("fullgraph", [True, False])
def test_a_limit_that_raises(fullgraph: bool) -> None:
    monitor = compile_monitor()
    with pytest.raises(Exception, match="Hard failure due to"), monitor:
        torch._dynamo.config.recompile_limit = 1
        torch._dynamo.config.fail_on_recompile_limit_hit = not fullgraph
        model = torch.compile(Model(), backend="eager", dynamic=False, fullgraph=fullgraph)
        train(model, [2, 3], monitor)
    assert [hit.raised for hit in monitor.limit_hits] == [True]
    assert monitor.suppressed == []  # it ended the block


def test_a_graph_break_has_its_line() -> None:
    with compile_monitor() as monitor:
        train(torch.compile(Breaking(), backend="eager"), [2, 2], monitor)
    (found,) = monitor.breaks
    assert found.location == line(Breaking, "item()")
    assert found.reason.startswith("Unsupported Tensor.item() call")
    assert not found.skipped and not found.in_torch
    assert monitor.graph_runs_by_step == {0: 2, 1: 2}


def test_a_function_that_is_left_uncompiled_for_a_break() -> None:
    with compile_monitor() as monitor:
        train(torch.compile(Skipped(), backend="eager"), [2], monitor)
    assert [found.skipped for found in monitor.breaks] == [True]
    assert not monitor.graphs and not monitor.is_compiled()
    assert str(monitor).startswith("NOT compiled: no graph was captured (")


@pytest.mark.filterwarnings("ignore")
def test_an_error_that_torch_swallows() -> None:
    with compile_monitor() as monitor:
        torch._dynamo.config.suppress_errors = True
        train(torch.compile(Model(), backend=failing), [2, 2], monitor)
    (found,) = monitor.suppressed
    assert (
        found.message == "BackendCompilerFailed: backend='failing' raised: RuntimeError: no such instruction"
    )
    assert (found.swallowed_by, found.step) == ("torch", 0) and not monitor.is_compiled()
    assert torch._dynamo.config.suppress_errors is False


def test_an_exception_of_a_backend_that_torch_falls_back_on() -> None:
    from torch._subclasses.fake_tensor import DataDependentOutputException

    def backend(_module: Any, _inputs: Any) -> Any:
        raise DataDependentOutputException(torch.ops.aten.item.default)

    with compile_monitor() as monitor:
        train(torch.compile(Model(), backend=backend), [2], monitor)
    assert [(e.swallowed_by, e.message) for e in monitor.suppressed] == [
        ("torch", "DataDependentOutputException: aten.item.default")
    ]


def test_an_error_that_the_program_swallows() -> None:
    model = Model()
    with compile_monitor() as monitor:
        compiled = torch.compile(model, backend=failing)
        try:
            compiled(torch.ones(2, 4))
        except Exception:
            model(torch.ones(2, 4))
    assert [e.swallowed_by for e in monitor.suppressed] == ["the program"]
    assert not monitor.is_compiled()


def test_an_error_that_ends_the_block_is_not_swallowed() -> None:
    monitor = compile_monitor()
    with pytest.raises(ValueError, match=r"^training failed$"), monitor:
        try:
            torch.compile(Model(), backend=failing)(torch.ones(2, 4))
        except Exception as error:
            raise ValueError("training failed") from error
    assert monitor.suppressed == []


def test_a_wrapper_whose_graphs_do_not_run_is_not_compiled() -> None:
    compiled: Any = torch.compile(Model(), backend="eager")
    with compile_monitor() as monitor:
        train(compiled._orig_mod, [2, 2], monitor)
    assert not monitor.is_compiled() and monitor.graph_runs == 0


def test_a_step_without_a_graph_is_not_compiled_whatever_evaluation_does() -> None:
    model = Model()
    compiled = torch.compile(model, backend="eager")
    with compile_monitor() as monitor:
        monitor.step(0, "train")
        compiled(torch.ones(2, 4))
        monitor.step(1, "train")
        model(torch.ones(2, 4))
        monitor.phase("eval")
        compiled(torch.ones(2, 4))
    assert monitor.report().eager_steps() == [1]
    assert not monitor.is_compiled() and monitor.is_compiled(after_step=1) is False


def test_an_evaluation_in_eager_leaves_training_compiled() -> None:
    model = Model()
    compiled = torch.compile(model, backend="eager")
    with compile_monitor() as monitor:
        monitor.step(0, "train")
        compiled(torch.ones(2, 4))
        monitor.phase("eval")
        model(torch.ones(2, 4))
    assert monitor.is_compiled()


def test_a_phase_alone_is_no_step() -> None:
    compiled = torch.compile(Model(), backend="eager")
    with compile_monitor() as monitor:
        monitor.step(0, "eval")
        compiled(torch.ones(2, 4))
        monitor.phase("train")
        for step in (1, 2):
            monitor.step(step)
            compiled(torch.ones(2, 4))
    assert monitor.is_compiled() and monitor.report().eager_steps() == []


def test_a_step_under_a_dispatch_mode_leaves_the_rest_uncompiled() -> None:
    """As a counter of operations or of memory around the first step does."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Mode(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            return func(*args, **(kwargs or {}))

    compiled = torch.compile(Model(), backend="eager")
    with compile_monitor() as monitor:
        with Mode():  # type: ignore[no-untyped-call]
            compiled(torch.ones(2, 4))
        compiled(torch.ones(2, 4))
    assert not monitor.is_compiled()
    (note,) = monitor.report().notes
    place = line(Model, "def forward")
    assert note == f"Model.forward stays uncompiled, it was called under a dispatch mode   at {place}"


def test_what_was_compiled_before_is_compiled_again_and_seen() -> None:
    compiled = torch.compile(Model(), backend="eager")
    compiled(torch.ones(2, 4))
    with compile_monitor() as monitor:
        compiled(torch.ones(2, 4))
    assert len(monitor.graphs) == monitor.graph_runs == 1 and monitor.report().compiled_before >= 1


def test_a_reset_and_cleared_counters_in_the_block_hide_nothing() -> None:
    with compile_monitor() as monitor:
        compiled = torch.compile(Model(), backend="eager")
        compiled(torch.ones(2, 4))
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        compiled(torch.ones(2, 4))
    assert len(monitor.graphs) == monitor.graph_runs == 2


def test_runs_in_threads_are_all_counted() -> None:
    compiled = torch.compile(Model(), backend="eager")
    with compile_monitor() as monitor:
        compiled(torch.ones(2, 4))
        threads = [
            threading.Thread(target=lambda: [compiled(torch.ones(2, 4)) for _ in range(50)]) for _ in range(4)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert monitor.graph_runs == 201


def test_a_second_monitor_is_refused() -> None:
    with compile_monitor() as outer:
        with pytest.raises(RuntimeError) as caught:
            compile_monitor().__enter__()
        torch.compile(Model(), backend="eager")(torch.ones(2, 4))
    assert str(caught.value) == (
        "a compile_monitor is open already, and entering another would reset what it watches; end its block "
        "first, or use it (monitor.phase, monitor.step) instead of a second one"
    )
    assert outer.is_compiled()


def test_a_monitor_serves_one_block() -> None:
    with compile_monitor() as monitor:
        pass
    with pytest.raises(RuntimeError, match=r"^this compile_monitor was in use already; each block needs one"):
        monitor.__enter__()


def _sequential() -> Callable[..., Any]:
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.ReLU())
    model.compile(backend="eager")
    return model


def test_torchs_own_containers_by_method_compile_nothing() -> None:
    """Really so in torch: dynamo passes over the forward of ``nn.Sequential`` itself."""
    with compile_monitor() as monitor:
        train(_sequential(), [2], monitor)
    assert not monitor.is_compiled()
    with compile_monitor() as monitor:
        train(torch.compile(torch.nn.Sequential(Model()), backend="eager"), [2], monitor)
    assert [graph.function for graph in monitor.graphs] == ["Sequential.forward"] and monitor.is_compiled()


def test_one_graph_for_all_blocks_of_a_regional_compilation() -> None:
    blocks = torch.nn.ModuleList(Model() for _ in range(10))
    for block in blocks:
        block.compile(backend="eager")
    with compile_monitor() as monitor:
        for step in range(2):
            monitor.step(step)
            x = torch.ones(2, 4, requires_grad=True)
            for block in blocks:
                x = block(x)
    assert len(monitor.graphs) == 1 and monitor.graph_runs_by_step == {0: 10, 1: 10}


def test_a_function_of_autograd_by_hand_is_in_the_graph() -> None:
    class Double(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
            return x * 2

        @staticmethod
        def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
            return gradient * 2

    def function(x: torch.Tensor) -> torch.Tensor:
        doubled: torch.Tensor = Double.apply(x)  # type: ignore[no-untyped-call]
        return doubled

    with compile_monitor() as monitor:
        train(torch.compile(function, backend="aot_eager", fullgraph=True), [2, 2], monitor)
    assert monitor.is_compiled() and not monitor.breaks


def test_a_disabled_function_is_a_break_and_a_stance_is_noted() -> None:
    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def apart(x: torch.Tensor) -> torch.Tensor:
        return x + 1

    def function(x: torch.Tensor) -> torch.Tensor:
        output: torch.Tensor = apart(x * 2) * 3
        return output

    with compile_monitor() as monitor:
        compiled = torch.compile(function, backend="eager")
        train(compiled, [2], monitor)
        with torch.compiler.set_stance("force_eager"):
            monitor.step(1)
            compiled(torch.ones(2, 4))
    (found,) = monitor.breaks
    assert "torch.compiler.disable" in found.reason and found.location.endswith(" in function")
    assert monitor.report().notes == ("torch.compiler.set_stance('force_eager') was called",)
    assert monitor.report().eager_steps() == [1]
