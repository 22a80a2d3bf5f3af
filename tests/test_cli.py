"""``gputrain check``: exit codes, the table, bad input. Real processes where a process is what counts."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from pytest_gputrain import checks as room
from pytest_gputrain.checks import CheckResult
from pytest_gputrain.cli import main

ROOT = Path(__file__).parent.parent
GPT = "pytest_gputrain.reference.gpt:case"

needs_linux = pytest.mark.skipif("sys.platform != 'linux'", reason="launching ranks needs Linux")


@pytest.fixture(autouse=True)
def _no_settings_of_the_caller(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("GPUTRAIN_FAKE_GPUS", "GPUTRAIN_SHARE_GPU", "CUDA_VISIBLE_DEVICES"):
        monkeypatch.delenv(name, raising=False)


def code_of(arguments: list[str]) -> int:
    """What the process would exit with: argparse leaves by SystemExit."""
    try:
        return main(arguments)
    except SystemExit as left:
        return int(left.code or 0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["check", "--timeout", "-1"],
            "gputrain check: argument --timeout: '-1' is not legal; give a number of seconds above 0",
        ),
        (
            ["check", "--timeout", "soon"],
            "gputrain check: argument --timeout: 'soon' is not legal; give a number of seconds above 0",
        ),
        (
            ["check", "--world-size", "0"],
            "gputrain check: argument --world-size: '0' is not legal; give a number of ranks from 2 up",
        ),
        (
            ["check", "--world-size", "-1"],
            "gputrain check: argument --world-size: '-1' is not legal; give a number of ranks from 2 up",
        ),
        (
            ["check", "--device", "tpu"],
            "gputrain check: argument --device: 'tpu' is not legal; give cpu or cuda",
        ),
        (
            ["check", "--json", "/no/such/folder/out.json"],
            "gputrain check: argument --json: '/no/such/folder/out.json' is not legal; "
            "give a file in a folder that is there",
        ),
        (
            ["check", "--compile-report", "/dev/null"],
            "gputrain check: argument --compile-report: '/dev/null' is not legal; give a folder, there or "
            "not yet there",
        ),
        (
            ["check", "nocolon"],
            "gputrain check: case: 'nocolon' is not MODULE:ATTR; give \"package.module:attribute\"",
        ),
        (
            ["check", "--gputrain-case", "json:dumps_all"],
            "gputrain check: case: json has no attribute 'dumps_all'; did you mean dumps or dump?",
        ),
        (
            ["check", "--world-sise=2", GPT],
            "gputrain check: unrecognized arguments: --world-sise=2; did you mean --world-size?; "
            "see gputrain check --help",
        ),
        (
            ["doctor", "--json", "/"],
            "gputrain doctor: argument --json: '/' is a folder; give a file, such as /out.json",
        ),
        (["lunch"], "gputrain: argument COMMAND: invalid choice: 'lunch'"),
        (
            ["check", "mine:case", "--checks", "ddp_parity", "ddp_completes"],
            "gputrain check: unrecognized arguments: ddp_completes; --checks takes several as A,B; see ",
        ),
        (
            [],
            "gputrain: the following arguments are required: COMMAND "
            "(one of check, report, find-batch, branches, diagnose, doctor); see gputrain --help\n",
        ),
        (["branches"], "gputrain branches: the following arguments are required: COMMAND (one of plan, run)"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(
    capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert code_of(arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(message)
    assert err.count("\n") == 1


def test_unknown_check_lists_the_legal_ones(capsys: pytest.CaptureFixture[str]) -> None:
    assert code_of(["check", "--checks", "gradients_arrive,lunch"]) == 2
    legal = ", ".join(room.all_check_ids())
    assert capsys.readouterr().err == (f"gputrain check: --checks: 'lunch' is no check; legal are {legal}\n")


def test_no_check_at_all_is_bad_input(capsys: pytest.CaptureFixture[str]) -> None:
    assert code_of(["check", "--checks", " , "]) == 2
    assert "--checks: ' , ' is no check" in capsys.readouterr().err


def test_too_few_gpus(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GPUTRAIN_FAKE_GPUS", "1")
    assert code_of(["check", "--device", "cuda"]) == 2
    assert capsys.readouterr().err == (
        "gputrain check: --device cuda --world-size 2 needs 2 GPUs, found 1 (pretended GPU, by "
        "GPUTRAIN_FAKE_GPUS); give --device cpu or fewer ranks\n"
    )


def test_pretended_gpus_cannot_be_shared(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GPUTRAIN_FAKE_GPUS", "1")
    assert code_of(["check", "--device", "cuda", "--share-gpu", GPT]) == 2
    assert capsys.readouterr().err == (
        "gputrain check: GPUs found here are pretended (GPUTRAIN_FAKE_GPUS=1): tests select and skip by "
        "them, but nothing can run on them; use device='cpu'\n"
    )


def test_share_gpu_by_the_environment(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GPUTRAIN_SHARE_GPU", "perhaps")
    assert code_of(["check", GPT]) == 2
    assert capsys.readouterr().err == (
        "gputrain check: GPUTRAIN_SHARE_GPU='perhaps' is not legal; give true or false\n"
    )


def test_a_misspelt_variable_is_refused(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GPUTRAIN_STAL", "5")
    assert code_of(["doctor"]) == 2
    assert capsys.readouterr() == (
        "",
        "gputrain doctor: GPUTRAIN_STAL='5': there is no such variable; did you mean GPUTRAIN_STALL?\n",
    )


def with_results(monkeypatch: pytest.MonkeyPatch, *results: CheckResult) -> None:
    """Have the checks room say that, so that every outcome can be had without a broken model."""

    def run_checks(case: Any, *, on_result: Any, **_: Any) -> list[CheckResult]:
        for result in results:
            on_result(result)
        return list(results)

    monkeypatch.setattr(room, "run_checks", run_checks)
    monkeypatch.setattr("pytest_gputrain.checks.preflight.preflight", lambda case, context: None)


PASSED = CheckResult(
    "ddp_parity", "gpt", "passed", "", {"ranks": 2, "worst": 1.23456789e-7, "notes": []}, 1.5
)
FAILED = CheckResult("ddp_completes", "gpt", "failed", "HUNG after 2 s\n  rank 0 waits", {}, 2.0)
SKIPPED = CheckResult("gradients_arrive", "gpt", "skipped", "does not apply", {}, 0.0)
ERROR = CheckResult("ddp_parity", "gpt", "error", "cannot judge", {}, 0.0)


@pytest.mark.parametrize(
    ("results", "code", "last"),
    [
        ([PASSED], 0, "1 passed, 0 failed, 0 skipped"),
        ([PASSED, SKIPPED], 0, "1 passed, 0 failed, 1 skipped"),
        ([PASSED, FAILED], 1, "1 passed, 1 failed, 0 skipped"),
        ([PASSED, ERROR], 1, "1 passed, 1 failed, 0 skipped"),
        ([SKIPPED], 5, "0 passed, 0 failed, 1 skipped"),
    ],
)
def test_exit_code_and_last_line(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    results: list[CheckResult],
    code: int,
    last: str,
) -> None:
    with_results(monkeypatch, *results)
    assert main(["check", GPT]) == code
    assert capsys.readouterr().out.splitlines()[-1] == last


def test_table(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    with_results(monkeypatch, PASSED, FAILED, SKIPPED)
    main(["check", GPT])
    assert capsys.readouterr().out.splitlines() == [
        "case  check                    outcome  seconds  figures",
        "gpt   ddp_parity               passed       1.5  ranks 2, worst 1.235e-07",
        "gpt   ddp_completes            failed       2.0  HUNG after 2 s",
        "gpt   gradients_arrive         skipped      0.0  does not apply",
        "",
        "== gpt ddp_completes: failed",
        "HUNG after 2 s",
        "  rank 0 waits",
        "",
        "1 passed, 1 failed, 1 skipped",
    ]


def test_without_a_case_it_says_what_is_checked(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with_results(monkeypatch, PASSED)
    monkeypatch.delenv("GPUTRAIN_CASE", raising=False)
    main(["check"])
    first, second, *_ = capsys.readouterr().out.splitlines()
    assert first == (
        "no case given, so the bundled reference models are checked; for a model of yours: "
        "gputrain check MODULE:ATTR (docs/cases.md)"
    )
    assert second.startswith("case ")


def test_json_carries_its_origin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with_results(monkeypatch, PASSED)
    assert main(["check", GPT, "--json", str(tmp_path / "out.json")]) == 0
    document = json.loads((tmp_path / "out.json").read_text())
    assert document["results"] == [
        {
            "case": "gpt",
            "check": "ddp_parity",
            "outcome": "passed",
            "message": "",
            "figures": {"ranks": 2, "worst": 1.23456789e-7, "notes": []},
            "seconds": 1.5,
        }
    ]
    origin = document["origin"]
    assert (origin["device"], origin["world_size"]) == ("cpu", 2)
    assert {"cpu", "cpu_cores", "gpus", "python", "torch", "commit", "time"} <= set(origin)


def gputrain(*arguments: str, cwd: Path, limit: float = 100) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "pytest_gputrain", *arguments],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=limit,
    )


USERS_CASES = """
from pytest_gputrain import TrainingCase
import torch

def model(): return torch.nn.Linear(4, 2)
def batch(batch_size, device): return torch.randn(batch_size, 4, device=device)
def loss(model, batch): return model(batch).square().mean()
def detached(model, batch): return model(batch).detach().square().mean()
def broken_batch(batch_size, device): raise RuntimeError("no data here")

good = TrainingCase(name="good", model=model, batch=batch, loss=loss)
bad = TrainingCase(name="bad", model=model, batch=batch, loss=detached)
no_batch = TrainingCase(name="no-batch", model=model, batch=broken_batch, loss=loss)
not_a_case = 7
"""


@needs_linux
def test_the_users_cases_in_the_working_directory(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(USERS_CASES)
    done = gputrain(
        "check", "mine:good", "--gputrain-case", "mine:bad", "--checks=gradients_arrive", cwd=tmp_path
    )
    assert done.returncode == 1, done.stderr
    lines = done.stdout.splitlines()
    assert lines[1].startswith("good  gradients_arrive  passed")
    assert lines[2].startswith("bad   gradients_arrive  failed")
    assert lines[-1] == "1 passed, 1 failed, 0 skipped"


@needs_linux
@pytest.mark.parametrize(
    ("attribute", "message"),
    [
        ("no_batch", "gputrain check: case 'no-batch': batch() raised RuntimeError: no data here"),
        pytest.param("not_a_case", "gputrain check: case: mine:not_a_case is ", marks=pytest.mark.nightly),
    ],
)
def test_a_case_that_cannot_be_used_stops_before_any_check(
    tmp_path: Path, attribute: str, message: str
) -> None:
    (tmp_path / "mine.py").write_text(USERS_CASES)
    done = gputrain("check", "mine:good", f"mine:{attribute}", cwd=tmp_path)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith(message)
    assert done.stderr.count("\n") == 1


@needs_linux
def test_interrupt_ends_everything(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(
        USERS_CASES + "import time\ndef slow(model, batch): time.sleep(100)\n"
        "hangs = TrainingCase(name='hangs', model=model, batch=batch, loss=slow)\n"
    )
    child = subprocess.Popen(
        [sys.executable, "-m", "pytest_gputrain", "check", "mine:hangs"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert child.stdout is not None
    assert child.stdout.readline().startswith("case")  # the first check is about to start its ranks
    time.sleep(2)
    child.send_signal(signal.SIGINT)
    _, err = child.communicate(timeout=100)
    assert (child.returncode, err) == (130, "gputrain check: interrupted\n")
    assert left_in(tmp_path) == []


def left_in(folder: Path) -> list[str]:
    """The command lines of processes that work in that folder, after they had a moment to end."""
    import psutil

    deadline = time.monotonic() + 30
    while True:
        found = []
        for process in psutil.process_iter(["cmdline", "cwd"]):
            if process.info["cwd"] == str(folder):
                found.append(" ".join(process.info["cmdline"] or []))
        if not found or time.monotonic() > deadline:
            return found
        time.sleep(0.1)
