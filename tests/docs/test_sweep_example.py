"""The example from a base run to the picture of a sweep, run small."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "docs" / "examples" / "sweep.sh"


@pytest.mark.slow
@pytest.mark.skipif("sys.platform != 'linux'", reason="launching ranks needs Linux")
def test_the_whole_path_from_a_base_run_to_a_picture(tmp_path: Path) -> None:
    own = tmp_path / "bin"
    own.mkdir()
    for name, what in (("python", ""), ("gputrain", "-m pytest_gputrain")):
        (own / name).write_text(f'#!/bin/sh\nexec "{sys.executable}" {what} "$@"\n')
        (own / name).chmod(0o755)
    environ = {
        **os.environ,
        "PATH": f"{own}:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "STEPS": "3",
        "TOKENS": "1100",
        "KS": "1 2",
    }
    done = subprocess.run(
        ["bash", str(EXAMPLE), "sweep"], env=environ, cwd=tmp_path, text=True, timeout=280, check=False,
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
    found = json.loads((tmp_path / "sweep" / "results" / "sweep_results.json").read_text())
    assert (found["successful_runs"], found["total_runs"]) == (2, 2)
    for branch, rate in zip(found["results"], (1e-3, 1e-3 * 2**0.5), strict=True):
        assert branch["tokens"] == 17 * 64  # 1,100 in whole sequences
        assert branch["learning_rate"] == pytest.approx(rate)
        assert branch["curve"][-1] == [17 * 64, branch["final_loss"]]
        assert branch["notes"] == []
    if "a plot needs matplotlib" not in done.stdout:
        assert (tmp_path / "sweep" / "results" / "sweep.png").stat().st_size > 10_000


def test_the_documentation_knows_it() -> None:
    assert "docs/examples/sweep.sh" in (ROOT / "docs" / "branches.md").read_text()
