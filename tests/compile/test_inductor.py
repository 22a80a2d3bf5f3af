"""The monitor on inductor: code is really generated, and the second time comes from its cache."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from pytest_gputrain import compile_monitor
from pytest_gputrain.compile.backend import validate_backend
from pytest_gputrain.compile.monitor import CompileMonitor

pytestmark = pytest.mark.slow


def train() -> CompileMonitor:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.GELU())
    with compile_monitor() as monitor:
        compiled = torch.compile(model, dynamic=False)
        for step in range(3):
            monitor.step(step)
            compiled(torch.ones(2, 8)).sum().backward()
    return monitor


def test_compiled_then_from_the_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    if reason := validate_backend("inductor"):
        pytest.skip(reason)
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    first, second = train(), train()
    for monitor in (first, second):
        assert monitor.is_compiled() and [g.backend for g in monitor.graphs] == ["inductor"], monitor
        assert monitor.graph_runs_by_step == {0: 1, 1: 1, 2: 1}
        assert monitor.report().notes == ()
    assert (first.cache_hits, second.cache_hits) == (0, 1)
    assert second.compile_seconds < first.compile_seconds
