"""How these tests run pytest inside pytest: this plugin alone, and nothing of the caller's settings."""

from __future__ import annotations

import os
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
    """Whether a session inside this process has imported torch.

    It must not: pytester forgets the modules of each session, and a second torch in one process is a
    segmentation fault in some later collection of garbage, of which nobody ever sees more than a lost worker.
    """

    imported = False

    def pytest_unconfigure(self) -> None:
        self.imported = "torch" in sys.modules


@pytest.fixture
def run(pytester: pytest.Pytester) -> Run:
    """Run pytest with the plugin in this process: quick, for everything that is not about processes."""

    def run_here(*arguments: str) -> pytest.RunResult:
        known, torch = "torch" in sys.modules, _Torch()
        result = pytester.runpytest_inprocess("-p", "pytest_gputrain", *arguments, plugins=[torch])
        assert known or not torch.imported, "this session imported torch into this process: use run_child"
        return result

    return run_here


@pytest.fixture
def run_child(pytester: pytest.Pytester) -> Run:
    """Run pytest with the plugin, xdist and pytest-timeout in a child process."""
    plugins = [part for name in ("xdist", "timeout", "pytest_gputrain") for part in ("-p", name)]
    return lambda *arguments: pytester.runpytest_subprocess(*plugins, *arguments, timeout=100)
