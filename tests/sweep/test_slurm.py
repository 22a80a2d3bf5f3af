"""The Slurm array script, run as Slurm runs its tasks, without Slurm."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.sweep.conftest import SCRIPT
from tests.sweep.test_run_command import wait_for

pytestmark = pytest.mark.skipif("sys.platform != 'linux'", reason="launching ranks needs Linux")
ROOT = Path(__file__).parents[2]
SBATCH = ROOT / "ci" / "slurm" / "sweep.sbatch"


def task(folder: Path, index: int, *arguments: object) -> subprocess.Popen[str]:
    """A task of the array; ``gputrain`` is this checkout's."""
    own = folder.parent / "bin" / "gputrain"
    if not own.exists():  # else another task may be running it
        own.parent.mkdir()
        own.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m pytest_gputrain "$@"\n')
        own.chmod(0o755)
    environ = {
        **os.environ,
        "PATH": f"{own.parent}:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "SLURM_ARRAY_TASK_ID": str(index),
    }
    return subprocess.Popen(
        ["bash", str(SBATCH), str(folder), *map(str, arguments)], env=environ, text=True,
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip


def results(folder: Path) -> dict[int, str]:
    found = json.loads((folder / "results" / "sweep_results.json").read_text())
    return {entry["k"]: entry["verdict"] for entry in found["results"]}


def test_the_script_is_a_shell_script_with_an_array_in_its_usage() -> None:
    subprocess.run(["bash", "-n", str(SBATCH)], check=True)
    text = SBATCH.read_text()
    assert re.search(r"sbatch --array=0-3 ci/slurm/sweep\.sbatch", text)
    assert "ci/slurm/sweep.sbatch" in (ROOT / "docs" / "branches.md").read_text()


@pytest.mark.slow
def test_tasks_at_the_same_time_fill_one_file(planned: Callable[..., Path], checkpoint: Path) -> None:
    folder = planned(1, 2)
    tasks = [task(folder, index, checkpoint, SCRIPT) for index in (0, 1)]
    said = [child.communicate(timeout=250)[0] for child in tasks]
    assert [child.returncode for child in tasks] == [0, 0], said
    assert results(folder) == {1: "PASSED", 2: "PASSED"}


@pytest.mark.slow
def test_a_task_that_slurm_ends_writes_what_there_is(planned: Callable[..., Path], checkpoint: Path) -> None:
    folder = planned(1, 2)
    child = task(folder, 1, checkpoint, SCRIPT, "--defect=ignores_signals")
    logs = "results/.branch_k2/*/rank0/stdout.log"
    try:
        assert wait_for(lambda: any("ready" in path.read_text() for path in folder.glob(logs)))
        child.send_signal(signal.SIGTERM)
        said = child.communicate(timeout=60)[0]
    finally:
        child.kill()
        child.wait()
    assert child.returncode == 130, said
    assert results(folder) == {2: "CANCELLED"}
