"""How these tests run pytest inside pytest: this plugin alone, and nothing of the caller's settings."""

from __future__ import annotations

import importlib
import os
import pkgutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent

Run = Callable[..., pytest.RunResult]


@pytest.fixture(autouse=True)
def _no_settings_of_the_caller(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in [*os.environ]:
        if name.startswith(("GPUTRAIN_", "PYTEST_ADDOPTS", "CUDA_VISIBLE_DEVICES")):
            monkeypatch.delenv(name)
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    # The same pretended GPUs in every test: through the host's folder they would wait for each other.
    monkeypatch.setenv("GPUTRAIN_LEASE_DIR", str(tmp_path / "leases"))


class _Torch:
    """What a session inside this process has imported of torch.

    It must be nothing: pytester forgets the modules of each session, and a second torch in one process is a
    segmentation fault in some later collection of garbage, of which nobody ever sees more than a lost worker.
    """

    def __init__(self) -> None:
        self.known = _torchs_modules()
        self.imported = set[str]()

    def pytest_unconfigure(self) -> None:
        self.imported = _torchs_modules() - self.known


def _torchs_modules() -> set[str]:
    return {name for name in sys.modules if name.partition(".")[0] == "torch"}


@pytest.fixture
def run(pytester: pytest.Pytester) -> Run:
    """Run pytest with the plugin in this process: quick, for everything that is not about processes."""

    def run_here(*arguments: str) -> pytest.RunResult:
        torch = _Torch()
        result = pytester.runpytest_inprocess("-p", "pytest_gputrain", *arguments, plugins=[torch])
        assert not torch.imported, "this session imported torch's modules: use run_with_torch or run_child"
        return result

    return run_here


@pytest.fixture(scope="session")
def torch_is_there() -> None:
    """Before ``pytester``, which forgets all modules that are imported during its test: what sends calls to
    ranks would be there twice, and no class of the one would be found in the other.
    """
    import torch._dynamo
    import torch.distributed.run  # noqa: F401

    for room in ("plugin", "launch", "trace"):
        name = f"pytest_gputrain.{room}"
        for module in pkgutil.iter_modules(importlib.import_module(name).__path__, f"{name}."):
            importlib.import_module(module.name)


@pytest.fixture
def run_with_torch(torch_is_there: None, run: Run) -> Run:
    """``run`` where torch is there already: for sessions that need it, or launch, and end by themselves.

    Ranks come from this process's fork server, and so cost a hundredth of what a new session's would.
    """
    return run


@pytest.fixture
def run_child(pytester: pytest.Pytester) -> Run:
    """Run pytest with the plugin, xdist and pytest-timeout in a child process."""
    plugins = [part for name in ("xdist", "timeout", "pytest_gputrain") for part in ("-p", name)]
    return lambda *arguments: pytester.runpytest_subprocess(*plugins, *arguments, timeout=250)


@pytest.fixture
def run_each_way(run_with_torch: Run, run_child: Run) -> Run:
    """``run_child`` where xdist's ``-n`` is given, which needs it, else ``run_with_torch``."""
    return lambda *arguments: (run_child if "-n" in arguments else run_with_torch)(*arguments)
