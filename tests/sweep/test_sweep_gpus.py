"""GPUs of branches, pretended ones: nothing runs on them, so what is tested is who holds which."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from pytest_gputrain.cli import main
from pytest_gputrain.devices import discover
from pytest_gputrain.launch import LaunchCancelled
from pytest_gputrain.sweep.command import Command
from pytest_gputrain.sweep.gpus import Gpus
from pytest_gputrain.sweep.prepare import Asked, prepare
from pytest_gputrain.sweep.runner import run_prepared
from tests.sweep.conftest import SCRIPT


@pytest.fixture(autouse=True)
def _five_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GPUTRAIN_FAKE_GPUS", "5")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)


def never() -> bool:
    return False


def test_branches_side_by_side_hold_different_gpus(tmp_path: Path) -> None:
    gpus = Gpus(2, tmp_path / "leases")
    gpus.prepare()
    assert gpus.at_once == 2
    with gpus.held("branch_k1", never) as one, gpus.held("branch_k2", never) as other:
        assert len({*one, *other}) == 4
    with gpus.held("branch_k4", never) as again:
        assert len(again) == 2


def test_a_branch_that_waits_can_be_cancelled(tmp_path: Path) -> None:
    gpus, cancelled = Gpus(5, tmp_path / "leases"), threading.Event()
    gpus.prepare()
    with gpus.held("branch_k1", never):
        cancelled.set()
        with pytest.raises(LaunchCancelled), gpus.held("branch_k2", cancelled.is_set):
            pytest.fail("all GPUs were held")
    with gpus.held("branch_k4", never) as again:
        assert len(again) == 5


@pytest.mark.skipif("sys.platform != 'linux'", reason="launching ranks needs Linux")
def test_a_branch_sees_the_gpu_that_it_holds(
    planned: Callable[..., Path], checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Four of five are held by another: the branch gets the fifth, and gives it back."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    gpus, script = Gpus(1, tmp_path / "leases"), tmp_path / "visible.py"
    gpus.prepare()
    script.write_text("import os\nprint('sees', os.environ['CUDA_VISIBLE_DEVICES'], 'alone')\n")
    asked = Asked(
        folder=planned(1), checkpoint=checkpoint, command=Command(str(script), ("{config}", "{checkpoint}"))
    )
    with Gpus(4, tmp_path / "leases").held("another", never) as others:
        result = run_prepared(dataclasses.replace(prepare(asked), gpus=gpus))
    assert result.passed, result.results[0].message
    (left,) = {gpu.uuid for gpu in discover().gpus} - {gpu.uuid for gpu in others}
    assert f"sees {left} alone" in (result.path.parent / "branch_k1.log").read_text()
    with Gpus(5, tmp_path / "leases").held("branch_k2", never) as again:
        assert len(again) == 5


@pytest.mark.skipif("sys.platform != 'linux'", reason="launching ranks needs Linux")
def test_pretended_gpus_run_nothing(
    planned: Callable[..., Path], checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With GPUs to be seen, branches run on them unless --device says cpu."""
    given = ["branches", "run", str(planned(1)), "--checkpoint", str(checkpoint)]
    assert main([*given, "--", str(SCRIPT)]) == 2
    assert "GPUs found here are pretended (GPUTRAIN_FAKE_GPUS=5)" in capsys.readouterr().err
    assert main([*given, "--device", "cpu", "--dry-run", "--", str(SCRIPT)]) == 0
