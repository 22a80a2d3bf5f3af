"""``compile_monitor`` on real compilations, with dynamo's "eager" backend where none is asked for."""

from __future__ import annotations

import pickle
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


def train(model: Any, sizes: list[int], monitor: CompileMonitor) -> None:
    for step, size in enumerate(sizes):
        monitor.step(step)
        model(torch.ones(size, 4)).sum().backward()


def test_one_graph_that_runs_in_each_step() -> None:
    with compile_monitor() as monitor:
        train(torch.compile(Model(), backend="eager"), [2, 2, 2], monitor)
    assert [(g.function, g.backend, g.step, g.ops) for g in monitor.graphs] == [
        ("Model.forward", "eager", 0, 2)
    ]
    assert monitor.graph_runs_by_step == {0: 1, 1: 1, 2: 1}
    assert (
        monitor.is_compiled() and monitor.is_compiled(after_step=1) and not monitor.is_compiled(after_step=2)
    )
    assert monitor.compile_seconds_by_step[0] == monitor.compile_seconds > 0
    assert pickle.loads(pickle.dumps(monitor.report())) == monitor.report()


def test_a_recompile_has_dynamos_reason_and_the_users_line() -> None:
    with compile_monitor() as monitor:
        train(torch.compile(Model(), backend="eager", dynamic=False), [2, 3], monitor)
    (found,) = monitor.recompiles
    assert found.reason == "tensor 'x' size mismatch at index 0. expected 2, actual 3"
    assert (found.step, found.number, found.function) == (1, 1, "Model.forward")
    assert found.called_from is not None and "test_monitor.py" in found.called_from
    assert found.called_from.endswith(" in train")


def test_a_second_monitor_is_refused() -> None:
    with compile_monitor(), pytest.raises(RuntimeError, match=r"^a compile_monitor is open already, "):
        compile_monitor().__enter__()
