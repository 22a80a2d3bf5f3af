"""Concurrent pytest processes on one cache: one of them discovers, the others find what it measured."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from pytest_gputrain.batch.cache import BatchCache

ROOT = Path(__file__).parents[2]

# Each waits for all the others before it begins: so they are at it at once, however long they took to start.
TEST = """
import os, time
from pathlib import Path
import torch
from pytest_gputrain import TrainingCase

torch.set_num_threads(1)
CASE = TrainingCase(
    name="net",
    model=lambda: torch.nn.Sequential(torch.nn.Linear(64, 256), torch.nn.GELU(), torch.nn.Linear(256, 64)),
    batch=lambda batch_size, device: torch.randn(batch_size, 32, 64),
    loss=lambda model, batch: model(batch).square().mean(),
)


def test_it_is_found(batch_finder):
    meeting = Path("meeting")
    (meeting / str(os.getpid())).touch()
    while len(list(meeting.iterdir())) < int(os.environ["HOW_MANY"]):
        time.sleep(0.01)
    found = batch_finder(CASE, capacity="4MB", use_cache=True)
    print(f"FOUND {found.source} {found.size}")
    assert found.size > 1
"""

# What costs when processes are started is importing torch: once here, and then sessions of their own.
FORKED = """
import os, sys, torch, pytest
children = []
for number in range(int(os.environ["HOW_MANY"])):
    pid = os.fork()
    if not pid:
        os.dup2(os.open(f"out-{number}", os.O_WRONLY | os.O_CREAT), 1)
        os._exit(pytest.main(sys.argv[1:]))
    children.append(pid)
sys.exit(max(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in children))
"""
ARGUMENTS = ["-s", "-p", "pytest_gputrain", "-p", "no:cacheprovider", "--gputrain-cache-dir=cache", "-q"]


@pytest.fixture
def environ(tmp_path: Path) -> dict[str, str]:
    (tmp_path / "test_it.py").write_text(TEST)
    (tmp_path / "meeting").mkdir()
    kept = {name: value for name, value in os.environ.items() if not name.startswith("GPUTRAIN_")}
    return {**kept, "PYTHONPATH": str(ROOT), "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}


def assert_one_discovered(outputs: list[str], folder: Path, count: int) -> None:
    """And the others found it, in one entry that is whole, beside its lock and nothing else."""
    found = [match for output in outputs if (match := re.search(r"FOUND (\w+) (\d+)", output))]
    assert sorted(match[1] for match in found) == ["cache"] * (count - 1) + ["discovered"], "\n".join(outputs)
    assert len({match[2] for match in found}) == 1
    assert sorted(path.suffix for path in folder.iterdir()) == [".json", ".lock"]
    entry = next(folder.glob("*.json"))
    assert BatchCache(folder).load(json.loads(entry.read_text())["key"]) is not None


@pytest.mark.skipif("not hasattr(os, 'fork')")
@pytest.mark.parametrize("count", [2, pytest.param(8, marks=pytest.mark.nightly)])
def test_one_of_several_sessions_discovers(tmp_path: Path, environ: dict[str, str], count: int) -> None:
    environ["HOW_MANY"] = str(count)
    done = subprocess.run(
        [sys.executable, "-c", FORKED, *ARGUMENTS], cwd=tmp_path, env=environ, text=True, check=False,
        stdin=subprocess.DEVNULL, capture_output=True, timeout=200,
    )  # fmt: skip
    outputs = [path.read_text() for path in tmp_path.glob("out-*")]
    assert done.returncode == 0, "\n".join([done.stderr, *outputs])
    assert_one_discovered(outputs, tmp_path / "cache", count)
