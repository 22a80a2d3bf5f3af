"""``stable_training``: what it keeps, how it goes on after a kill, and what it compares with."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from pytest_gputrain.case import TrainingCase
from pytest_gputrain.checks import CheckResult, run_checks
from pytest_gputrain.cli import main
from pytest_gputrain.endurance.folder import held
from pytest_gputrain.endurance.losses import read_losses
from pytest_gputrain.endurance.plan import StabilityOptions, StabilityUsageError
from pytest_gputrain.endurance.records import read_records
from tests.planted.broken_stability_runs import Step
from tests.planted.plant import case, draw, rank

STEPS = 60
KILLED = 47


class KilledOnce(Step):
    """The second rank is killed in a step, as long as a file says so."""

    def __init__(self, switch: Path) -> None:
        super().__init__()
        self.switch = switch

    def take(self, model: Any, optimizer: Any, micro_batches: Any) -> Any:
        if self.steps == KILLED and rank() == 1 and self.switch.exists():
            self.switch.unlink()
            os.kill(os.getpid(), signal.SIGKILL)
        return super().take(model, optimizer, micro_batches)


class Stream:
    """An epoch of 25 batches from torch's generator; with ``shuffled`` in an order that no seed gives."""

    def __init__(self, shuffled: bool = False) -> None:
        self.shuffled = shuffled

    def __call__(self) -> Iterator[Any]:
        batches = [draw(4, "cpu") for _ in range(25)]
        if self.shuffled:
            own = torch.Generator()
            own.seed()
            batches = [batches[place] for place in torch.randperm(25, generator=own)]
        return iter(batches)


def stable(subject: TrainingCase, folder: Path, **options: Any) -> CheckResult:
    kept = StabilityOptions(folder=str(folder), save_every=20, **options)
    return run_checks(subject, checks=["stable_training"], iterations=STEPS, stability=kept)[0]


def switch_on(folder: Path) -> Path:
    switch = folder / "kill"
    switch.touch()
    return switch


def trajectory(folder: Path) -> tuple[list[str], list[list[str | None]]]:
    """Losses as they are written, and digests of the weights by rank."""
    lines = [line for line in (folder / "losses.txt").read_text().splitlines() if line[0] != "#"]
    records = [read_records(folder / f"steps-rank{rank}.jsonl").records for rank in (0, 1)]
    return lines, [[record.digest for record in those] for those in records]


@pytest.fixture(scope="module")
def killed_once(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a run leaves whose second rank was killed."""
    folder = tmp_path_factory.mktemp("killed")
    subject = case("killed", step=KilledOnce(switch_on(folder)), batches=Stream())
    killed = stable(subject, folder)
    assert killed.outcome == "failed"
    first = killed.message.splitlines()[0]
    assert "rank 1 was killed by SIGKILL" in first
    assert f"(in step {KILLED}" in first
    assert "  the same command goes on from step 40 (" in killed.message
    return folder


@pytest.fixture
def killed(killed_once: Path, tmp_path: Path) -> Path:
    shutil.copytree(killed_once, tmp_path / "killed")
    return tmp_path / "killed"


SUBJECT = case("killed", batches=Stream())


def test_a_killed_run_goes_on_where_its_checkpoint_is_and_ends_the_same(killed: Path, tmp_path: Path) -> None:
    whole = stable(SUBJECT, tmp_path / "whole")
    assert whole.outcome == "passed", whole.message
    resumed = stable(SUBJECT, killed)
    assert resumed.outcome == "passed", resumed.message
    assert f"resumed at step 40 after a run that ended at step {KILLED - 1}" in resumed.figures["notes"]
    folder = killed / "stability" / "killed-cpu-x2"
    assert trajectory(folder) == trajectory(tmp_path / "whole" / "stability" / "killed-cpu-x2")
    assert len(trajectory(folder)[0]) == STEPS
    assert not list(folder.glob("checkpoint-*"))
    described = json.loads((folder / "run.json").read_text())
    assert described["ended"] == "passed"
    assert described["settings"]["seed"] == 1234
    assert described["flags"]["deterministic_algorithms"] is False
    again = stable(SUBJECT, killed)
    assert "begun anew; a finished run of 60 steps is kept in previous/" in again.figures["notes"]


def test_a_rank_that_died_before_it_recorded_the_step_is_not_waited_for(killed: Path) -> None:
    path = killed / "stability" / "killed-cpu-x2" / "steps-rank1.jsonl"
    path.write_text("\n".join(path.read_text().splitlines()[:-2]) + "\n")
    resumed = stable(SUBJECT, killed)
    assert resumed.outcome == "passed", resumed.message


def test_a_folder_of_other_settings_is_refused(killed: Path) -> None:
    kept = StabilityOptions(folder=str(killed))
    with pytest.raises(StabilityUsageError) as refused:
        run_checks(SUBJECT, checks=["stable_training"], iterations=50, stability=kept)
    folder = killed / "stability" / "killed-cpu-x2"
    assert str(refused.value) == (
        f"{folder} holds an unfinished run of other settings (iterations 60, not 50); run it with those "
        "to go on, or remove the folder to start anew"
    )


def test_another_order_of_data_after_a_kill_is_caught(tmp_path: Path) -> None:
    subject = case("shuffled", step=KilledOnce(switch_on(tmp_path)), batches=Stream(shuffled=True))
    assert stable(subject, tmp_path).outcome == "failed"
    resumed = stable(subject, tmp_path)
    assert resumed.outcome == "failed"
    assert resumed.message.startswith("resumed with another order of data: the batch of step ")
    assert resumed.figures["kind"] == "data_order"


@pytest.mark.slow
def test_losses_are_compared_with_saved_ones(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    spec = [
        "check",
        "pytest_gputrain.reference.gpt:case",
        "--checks",
        "stable_training",
        "--iterations",
        "21",
    ]
    assert main([*spec, "--report", str(tmp_path)]) == 0
    saved = tmp_path / "stability" / "gpt-cpu-x2" / "losses.txt"
    assert main([*spec, "--losses", str(saved)]) == 0
    capsys.readouterr()
    loss = read_losses(saved)[12]
    saved.write_text(saved.read_text().replace(f"12 {loss!r}", f"12 {loss * 1.001!r}"))
    assert main([*spec, "--losses", str(saved)]) == 1
    said = capsys.readouterr().out
    assert (
        f"the loss leaves the saved one in step 12: {loss!r}, not {loss * 1.001!r} (allowed: exactly" in said
    )
    assert main([*spec, "--losses", str(saved), "--loss-tolerance", "0.01"]) == 0


@pytest.mark.parametrize("given", ["0", "-3", "many"])
def test_iterations_that_are_none(given: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["check", "--iterations", given])
    assert ended.value.code == 2
    assert f"{given!r} is not legal; give a whole number of 1 or more" in capsys.readouterr().err


def test_iterations_of_0_are_refused_in_python() -> None:
    with pytest.raises(ValueError, match="iterations is 0; give a whole number of steps from 1 up"):
        run_checks(case("tiny"), iterations=0)


def test_a_file_of_losses_that_is_none(tmp_path: Path) -> None:
    with pytest.raises(StabilityUsageError, match="there is no such file"):
        StabilityOptions(losses=str(tmp_path / "none.txt"))
    path = tmp_path / "losses.txt"
    for text, said in (
        ("1 2 3\n", "line 1 is '1 2 3'; legal is 'step loss'"),
        ("# no\n", "it holds no loss"),
    ):
        path.write_text(text)
        with pytest.raises(StabilityUsageError, match=said):
            read_losses(path)


def test_folders_that_hold_something_else(tmp_path: Path) -> None:
    folder = tmp_path / "stability" / "tiny-cpu-x2"
    folder.mkdir(parents=True)
    for content, said in (
        ("{", "is no stability run's; remove"),
        ('{"schema": "gputrain.stability_run", "version": 7}', "is of version 7, not 1; remove"),
    ):
        (folder / "run.json").write_text(content)
        with pytest.raises(StabilityUsageError, match=said):
            stable(case("tiny"), tmp_path)


def test_a_folder_that_another_run_writes_to(tmp_path: Path) -> None:
    with (
        held(tmp_path / "stability" / "tiny-cpu-x2"),
        pytest.raises(StabilityUsageError, match="another run writes there"),
    ):
        stable(case("tiny"), tmp_path)


def test_a_line_that_is_damaged_in_the_middle_is_refused(killed: Path) -> None:
    path = killed / "stability" / "killed-cpu-x2" / "steps-rank1.jsonl"
    lines = path.read_text().splitlines()
    path.write_text("\n".join([*lines[:5], lines[5][:40], *lines[6:], ""]))
    with pytest.raises(StabilityUsageError, match="line 6 of 46 is not a step's record"):
        stable(SUBJECT, killed)


class Climbs(Step):
    """As a loss that need not fall; ``leaks``: a hook more in every step."""

    def __init__(self, leaks: bool) -> None:
        super().__init__()
        self.leaks = leaks

    def take(self, model: Any, optimizer: Any, micro_batches: Any) -> Any:
        if self.leaks:
            model.module.head.register_forward_hook(lambda *_: None)
        optimizer.param_groups[0]["maximize"] = True
        return super().take(model, optimizer, micro_batches)


@pytest.mark.slow
@pytest.mark.parametrize("leaks", [False, True])
def test_a_loss_that_is_expected_to_rise_is_a_note_and_all_else_is_looked_for(leaks: bool) -> None:
    subject = case(
        "climbs", step=Climbs(leaks), expected_failures={"stable_training:loss": "it need not fall"}
    )
    (result,) = run_checks(subject, checks=["stable_training"], iterations=240)
    assert any(
        note.startswith("expected (it need not fall): the loss rises") for note in result.figures["notes"]
    )
    assert result.outcome == ("failed" if leaks else "passed")
    assert result.message.startswith("hooks on the model grow" if leaks else "expected (it need not fall)")
