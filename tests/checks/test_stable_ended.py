"""A stability run that is stopped, or whose folder cannot be written: what is left, and what is said."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from pytest_gputrain.checks import CheckContext, run_checks
from pytest_gputrain.checks.registry import as_check
from pytest_gputrain.checks.result import CheckFailed, Figures
from pytest_gputrain.checks.stable_keeping import Keeping
from pytest_gputrain.checks.stable_training import _with_step, _written
from pytest_gputrain.cli import main
from pytest_gputrain.endurance.folder import held, last_checkpoint, look, write_run
from pytest_gputrain.endurance.plan import StabilityOptions, StabilityUsageError
from pytest_gputrain.endurance.progress import last_words
from tests.planted.broken_stability_runs import Step
from tests.planted.plant import case
from tests.plugin.conftest import ROOT

NEVER_DONE = 100_000
MB = 1024**2


class Interrupting(threading.Thread):
    """Ctrl-C for the main thread, once a file is there."""

    def __init__(self, folder: Path, pattern: str) -> None:
        super().__init__(daemon=True)
        self.folder, self.pattern = folder, pattern

    def run(self) -> None:
        while not any(path.stat().st_size for path in self.folder.glob(self.pattern)):
            threading.Event().wait(0.05)
        ident = threading.main_thread().ident
        assert ident is not None
        signal.pthread_kill(ident, signal.SIGINT)


def test_an_interrupted_run_says_from_where_it_goes_on(tmp_path: Path) -> None:
    kept = StabilityOptions(folder=str(tmp_path), save_every=20)
    Interrupting(tmp_path, "stability/*/checkpoint-20-rank*.pt").start()
    with pytest.raises(KeyboardInterrupt):
        run_checks(case("stopped"), checks=["stable_training"], iterations=NEVER_DONE, stability=kept)
    folder = tmp_path / "stability" / "stopped-cpu-x2"
    (said,) = last_words()
    assert not last_words()
    step = last_checkpoint(folder, 2)
    what = f"goes on from step {step}" if step else "begins anew: there is no checkpoint yet"
    assert said.startswith("stable_training[stopped]: stopped after step ")
    assert said.endswith(f"; the same command {what} ({folder})")
    assert [path.name for path in folder.glob(".*")] == [".lock"]
    settings = {"world_size": 2, "iterations": NEVER_DONE}
    earlier = look(folder, settings)
    assert earlier is not None
    assert (earlier.step, earlier.finished) == (step, False)
    assert earlier.ended_at >= step


@pytest.mark.slow
def test_the_command_line_says_it_last(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Interrupting(tmp_path, "stability/*/steps-rank1.jsonl").start()
    spec = ["check", "tests.planted.healthy_stability:noisy_loss", "--checks", "stable_training"]
    assert main([*spec, "--iterations", str(NEVER_DONE), "--report", str(tmp_path)]) == 130
    lines = capsys.readouterr().err.splitlines()
    assert lines[-2] == "gputrain check: interrupted"
    assert lines[-1].startswith("stable_training[noisy_loss]: stopped after step ")
    assert lines[-1].endswith(f"({tmp_path}/stability/noisy_loss-cpu-x2)")


def test_what_ends_the_session_is_no_verdict_of_a_check() -> None:
    def body(*_: object) -> Figures:
        pytest.exit("terminated (SIGTERM)", returncode=143)

    with pytest.raises(pytest.exit.Exception):
        as_check("stable_training", body)(case("stopped"), CheckContext())


@pytest.mark.parametrize(("below", "why"), [("/proc", "No such file"), ("file", "Not a directory")])
def test_a_folder_that_cannot_be_written_is_bad_input(below: str, why: str, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    kept = StabilityOptions(folder=str(tmp_path / below))
    with pytest.raises(StabilityUsageError) as refused:
        run_checks(case("tiny"), checks=["stable_training"], stability=kept)
    said = str(refused.value)
    assert said.startswith(f"{tmp_path / below}/stability/tiny-cpu-x2 cannot be written to ({why}")
    assert said.endswith("); free space there, or give another folder")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_folder_in_which_nothing_was_written_is_not_left(tmp_path: Path) -> None:
    folder = tmp_path / "stability" / "tiny-cpu-x2"
    with held(folder):
        (folder / ".run.json.1234").touch()
        (folder / ".run.json.1234").unlink()
    assert not [*tmp_path.iterdir()]
    with held(folder):
        write_run(folder, {})
    (folder / ".steps-rank0.jsonl.99").touch()  # what a killed process leaves
    with held(folder):
        assert sorted(path.name for path in folder.iterdir()) == [".lock", "run.json"]


KEPT_BY = {"case": "tiny"}


def test_an_end_that_cannot_be_written_is_said(tmp_path: Path) -> None:
    gone = Keeping(tmp_path / "gone", True, 2, KEPT_BY)
    assert _written(gone, {1: 2.0}, None) == [
        f"how the run ended could not be written to {tmp_path / 'gone'} (No such file or directory): free "
        "space there, and run it again"
    ]


def test_a_full_disk_in_the_middle_is_told_from_one_of_the_programs(tmp_path: Path) -> None:
    keeping = Keeping(tmp_path, True, 2, KEPT_BY)
    write_run(tmp_path, {})
    first = "rank 0 raised OSError: [Errno 28] No space left on device"
    ours = _with_step(CheckFailed(f'{first}\n  File "pytest_gputrain/endurance/records.py"'), keeping)
    assert ours.message.splitlines()[:2] == [
        f"{first} (before the first step was done); the run is written to {tmp_path}: free space there, or "
        "give another folder",
        f"  the same command begins anew: there is no checkpoint yet ({tmp_path})",
    ]
    theirs = _with_step(CheckFailed(f'{first}\n  File "train.py"'), keeping)
    assert theirs.message.splitlines()[0] == f"{first} (before the first step was done)"


class KeepsMegabytes(Step):
    def __init__(self) -> None:
        super().__init__()
        self.kept: list[Any] = []

    def take(self, model: Any, optimizer: Any, micro_batches: Any) -> Any:
        self.kept.append(torch.zeros(MB // 4))
        return super().take(model, optimizer, micro_batches)


@pytest.mark.slow
def test_a_run_whose_memory_will_not_last_is_ended_early() -> None:
    """Within a budget, which would end it at the latest."""
    subject = case("leaks", step=KeepsMegabytes())
    kept = StabilityOptions(capacity=500 * MB)
    (result,) = run_checks(subject, checks=["stable_training"], iterations=NEVER_DONE, stability=kept)
    assert result.outcome == "failed"
    assert result.figures["kind"] == "memory_ahead"
    lines = result.message.splitlines()
    assert lines[0].startswith(
        ("memory will not last on every rank: up to ", "memory will not last on rank ")
    )
    assert "memory grows without end on every rank, by up to " in lines[1]
    assert 270 <= result.figures["steps"] < 500


FULL = """
import subprocess, sys
from pytest_gputrain.checks import run_checks
from pytest_gputrain.endurance.plan import StabilityOptions
from tests.planted.plant import case

if __name__ == "__main__":
    below, options = sys.argv[1:]
    subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", below], check=True)
    kept = StabilityOptions(folder=below, save_every=20)
    (result,) = run_checks(case("full"), checks=["stable_training"], iterations=60, stability=kept)
    print(result.outcome, result.message)
    print(*[path.name for path in __import__("pathlib").Path(below).glob("stability/*/.*")])
"""


@pytest.mark.slow
@pytest.mark.skipif(
    sys.platform != "linux" or subprocess.run(["unshare", "-m", "true"], check=False).returncode != 0,
    reason="needs a mount of its own",
)
def test_a_disk_that_is_full_in_the_middle(tmp_path: Path) -> None:
    (tmp_path / "small").mkdir()
    (tmp_path / "full.py").write_text(FULL)
    ended = subprocess.run(
        ["unshare", "-m", sys.executable, tmp_path / "full.py", tmp_path / "small", "size=100k"],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    lines = ended.stdout.splitlines()
    assert lines[0].startswith("failed rank ")
    assert "/small/stability/full-cpu-x2: free space there, or give another folder" in lines[0]
    assert "  the same command goes on from step 20 (" in lines[1]
    assert lines[-1] == ".lock"
