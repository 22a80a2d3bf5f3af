"""The gate over real nights: a program that really got worse is caught, an unchanged one is not."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

CASE = """
import os
import torch
from pytest_gputrain import TrainingCase

CHANGED = os.environ.get("CHANGED", "")
LAYERS = 40 if CHANGED == "compile" else 8
WIDTH = 256
PASSES = 16 if CHANGED == "slow" else 1  # real work, which changes nothing else

class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = torch.nn.ModuleList([torch.nn.Linear(WIDTH, WIDTH) for _ in range(LAYERS)])

    def forward(self, x):
        for layer in self.layers:
            x = x + torch.tanh(layer(x)) / LAYERS
        return x

def batch(size, device):
    x = torch.randn(size, WIDTH, device=device)
    return x, x.roll(1, dims=1)

def loss(model, batch):
    x, y = batch
    out = sum(model(x) for _ in range(PASSES)) / PASSES
    return (out - y).square().mean()

case = TrainingCase(
    name="case", model=Model, batch=batch, loss=loss,
    optimizer=lambda model: torch.optim.AdamW(model.parameters(), lr=1e-3 / (10 if CHANGED == "loss" else 1)),
)
"""


COMPILE = ("--checks", "compile_no_recompiles,compile_parity")
TRAIN = ("--checks", "stable_training", "--iterations", "80")


def run(folder: Path, report: str, checks: tuple[str, ...], changed: str = "") -> tuple[int, str]:
    """One night in a process of its own, held against those before; its exit code and what the gate said."""
    command = [sys.executable, "-m", "pytest_gputrain", "check", "nightly_case:case", "--report", report]
    command += checks
    if (folder / "nights").is_dir():
        command += ["--baseline", "nights"]
    env = {**os.environ, "CHANGED": changed, "PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=600)
    print(done.stdout, done.stderr)
    return done.returncode, done.stdout.partition("== baseline: ")[2]


def nights_and_one_more(folder: Path, checks: tuple[str, ...]) -> None:
    """Of one program; none of them is called worse."""
    assert run(folder, "nights/1", checks)[0] == 0
    for night in ("nights/2", "nights/3", "again"):
        code, said = run(folder, night, checks)
        assert (code, said.partition("\n")[0]) == (0, "passed")


@pytest.mark.nightly
@pytest.mark.timeout(900)
@pytest.mark.skipif("sys.platform != 'linux'", reason="launches ranks")
def test_compile_time_and_loss(tmp_path: Path) -> None:
    (tmp_path / "nightly_case.py").write_text(CASE)
    nights_and_one_more(tmp_path, COMPILE)
    code, said = run(tmp_path, "slower", COMPILE, "compile")
    assert code == 1
    assert said.startswith("failed\ncompile_cpu_seconds[case-compile_no_recompiles] is ")
    assert "% above the median of the last 3 of 3 good nights" in said
    code, said = run(tmp_path, "worse", COMPILE, "loss")
    assert code == 1
    assert said.startswith("failed\nfinal_loss[case-compile_parity] is ")
    page = (tmp_path / "worse" / "index.html").read_text()
    assert "|Δ loss| from the earlier report" in page
    assert "eager, earlier" in page


@pytest.mark.nightly
@pytest.mark.skipif("sys.platform != 'linux'", reason="launches ranks")
def test_training_that_became_slower(tmp_path: Path) -> None:
    (tmp_path / "nightly_case.py").write_text(CASE)
    nights_and_one_more(tmp_path, TRAIN)
    code, said = run(tmp_path, "slower", TRAIN, "slow")
    assert code == 1
    # By the process's own time: by the clock's alone, three nights of a busy machine explain any change.
    assert "step_cpu_seconds[case-stable_training] is " in said
    assert "final_loss" not in said
    page = (tmp_path / "slower" / "index.html").read_text()
    assert "rank 0, earlier" in page
