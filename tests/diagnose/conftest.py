"""The command line in this process, and what every plan must leave behind: nothing but its report."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from pytest_gputrain.cli import main


@dataclass
class Diagnosed:
    """What ``gputrain diagnose`` came to."""

    code: int
    stdout: str
    out: Path

    @property
    def report(self) -> dict[str, Any]:
        document: dict[str, Any] = json.loads((self.out / "report.json").read_text())
        return document

    @property
    def outcomes(self) -> dict[str, str]:
        return {phase["name"]: phase["outcome"] for phase in self.report["phases"]}

    @property
    def advice(self) -> list[str]:
        return [one["kind"] for one in self.report["advice"]]

    def phase(self, name: str) -> dict[str, Any]:
        found: dict[str, Any] = next(phase for phase in self.report["phases"] if phase["name"] == name)
        return found


Diagnose = Callable[..., Diagnosed]


@pytest.fixture
def diagnose(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Diagnose:
    """Run ``gputrain diagnose`` with generous times; everything it tells is kept."""
    for name in [*os.environ]:
        if name.startswith("GPUTRAIN_"):
            monkeypatch.delenv(name)
    # Where it is not set, the first import of dynamo in a process sets it.
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))

    def run(*arguments: str, timeout: float = 100, stall: float = 40) -> Diagnosed:
        out = tmp_path / "out"
        options = [f"--out={out}", f"--timeout={timeout}", f"--stall={stall}"]
        environ = dict(os.environ)
        code = main(["diagnose", *options, *arguments])
        assert dict(os.environ) == environ
        return Diagnosed(code, capsys.readouterr().out, out)

    return run
