"""Another backend in the place of inductor, and whether a backend can compile here."""

from __future__ import annotations

import sysconfig
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from pytest_gputrain import compile_monitor
from pytest_gputrain.compile.backend import standing_in, validate_backend


def own(module: torch.fx.GraphModule, _inputs: list[torch.Tensor]) -> Any:
    return module.forward


class Model(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        output: torch.Tensor = self.linear(x)
        return output


def _method(x: torch.Tensor, **settings: Any) -> Any:
    model = Model()
    model.compile(**settings)
    return model(x)


def test_however_inductor_is_asked_for() -> None:
    x = torch.ones(2, 4)
    with standing_in("eager"):  # or the decorator imports inductor
        before = torch.compile(Model())
    ways: list[Callable[[], Any]] = [
        lambda: before(x),
        lambda: torch.compile(Model())(x),
        lambda: torch.compile(Model(), mode="max-autotune-no-cudagraphs")(x),
        lambda: torch.compile(Model(), options={"max_autotune": False})(x),
        lambda: _method(x),
        lambda: _method(x, mode="reduce-overhead"),
        lambda: torch.compile(Model(), backend="inductor")(x),
    ]
    for way in ways:
        with standing_in("eager"), compile_monitor() as monitor:
            way()
        assert [graph.backend for graph in monitor.graphs] == ["eager"] and monitor.is_compiled()


def test_the_rest_is_as_given() -> None:
    with standing_in("eager"), compile_monitor() as monitor:
        torch.compile(Model(), dynamic=True)(torch.ones(2, 4))
        torch.compile(Model(), backend="aot_eager")(torch.ones(3, 4))
        torch.compile(Model(), backend=own)(torch.ones(3, 4))
    assert [graph.backend for graph in monitor.graphs] == ["eager", "aot_eager", "own"]
    assert "L['x'].size()[0]" in monitor.graphs[0].dynamic_dims


def test_inductor_itself_is_back_afterwards() -> None:
    wrapper: Any = torch._TorchCompileInductorWrapper
    before = wrapper.__call__
    with standing_in("eager"), standing_in("aot_eager"), compile_monitor() as monitor:
        torch.compile(Model())(torch.ones(2, 4))
    assert [graph.backend for graph in monitor.graphs] == ["aot_eager"]
    assert wrapper.__call__ is before


def test_an_unknown_backend_is_one_line_with_the_legal_names() -> None:
    with pytest.raises(ValueError, match=r"^unknown compile backend 'indcutor'; torch .* has aot_eager, .*$"):
        validate_backend("indcutor")
    with pytest.raises(ValueError, match=r"^unknown compile backend 'none'"), standing_in("none"):
        pass


def test_a_torch_that_is_too_old(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "__version__", "2.5.1+cpu")
    assert validate_backend("eager") == (
        "torch 2.5.1+cpu is too old for the compile checks; install torch 2.8 or newer"
    )


def test_no_compiler_for_inductor(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    assert validate_backend("aot_eager") is None
    assert validate_backend("inductor") == (
        "inductor needs a C++ compiler, and there is none on the PATH; install one (apt install g++, or set "
        "CXX), or use the backend aot_eager"
    )
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert validate_backend("inductor") == (
        "inductor needs a C++ compiler, and there is none on the PATH, and CXX='no-such-compiler' is none; "
        "install one (apt install g++, or set CXX), or use the backend aot_eager"
    )


def test_no_headers_for_inductor(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    compiler = tmp_path / "g++"
    compiler.touch(mode=0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr(sysconfig, "get_paths", lambda: {"include": str(tmp_path)})
    assert validate_backend("inductor") == (
        f"inductor compiles against Python.h, which is not in {tmp_path}; install Python's headers "
        "(apt install python3-dev), or use the backend aot_eager"
    )


def test_no_triton_for_inductor_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib.util

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert validate_backend("inductor", "cuda:1") == (
        "inductor generates Triton code for a GPU, and triton is not installed; pip install triton"
    )


def test_a_backend_that_gives_the_graph_back_is_noted() -> None:
    with compile_monitor() as monitor:
        torch.compile(Model(), backend=own)(torch.ones(3, 4))
    assert monitor.report().notes == (
        "the backend own returned a graph as it was captured: its operations run one by one, as eager",
    )
