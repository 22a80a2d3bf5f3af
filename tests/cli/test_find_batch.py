"""``gputrain find-batch``: what it measures, what it says, what it refuses. Real steps in real processes."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from pytest_gputrain.cli import main
from pytest_gputrain.values import format_size

ROOT = Path(__file__).parents[2]
CASES = """
import os, sys, time
import torch
from torch import nn
from pytest_gputrain import TrainingCase

WIDTH = 256

def model():
    return nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.GELU(), nn.Linear(WIDTH, WIDTH))

def batch(batch_size, device):
    return torch.randn(batch_size, 64, WIDTH, device=device)

def loss(model, batch):
    return model(batch).square().mean()

def wrong(model, batch):
    if len(batch) > 1:
        raise TypeError("unsupported operand")
    return loss(model, batch)

def through_numpy(model, batch):
    return loss(model, torch.from_numpy(model(batch).detach().numpy()))

def dies(model, batch):
    os.kill(os.getpid(), 9)

net = TrainingCase(name="net", model=model, batch=batch, loss=loss)
type_error = TrainingCase(name="type-error", model=model, batch=batch, loss=wrong)
crash = TrainingCase(name="crash", model=model, batch=batch, loss=dies)
numpy = TrainingCase(name="numpy", model=model, batch=batch, loss=through_numpy)
two = [net, crash]
"""

needs_linux = pytest.mark.skipif("sys.platform != 'linux'", reason="launching ranks needs Linux")
MEASURE = ["find-batch", "mine:net", "--device=cpu", "--capacity=24MB", "--eval-factor=0"]


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [*os.environ]:
        if name.startswith(("GPUTRAIN_", "CUDA_VISIBLE_DEVICES")):
            monkeypatch.delenv(name)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("GPUTRAIN_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text(CASES)


def code_of(*arguments: str) -> int:
    """What the process would exit with: argparse leaves by SystemExit."""
    try:
        return main(arguments)
    except SystemExit as left:
        return int(left.code or 0)


@needs_linux
def test_it_measures_tells_keeps_and_draws(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = [f"--json={tmp_path / 'out.json'}", f"--plot={tmp_path / 'out.png'}"]
    assert code_of(*MEASURE, "--world-size=1", *files) == 0
    first = capsys.readouterr()
    document = json.loads((tmp_path / "out.json").read_text())
    size, limit = document["device_batch_size"], document["limit_bytes"]
    peaks = {probe["batch_size"]: probe["peak_bytes"] for probe in document["probes"]}
    assert limit == 20_400_000
    assert peaks[size] <= limit
    assert peaks[size + 1] is None or peaks[size + 1] > limit
    assert sum(document["by_category"].values()) == pytest.approx(peaks[size], rel=0.01)
    assert (document["method"], document["source"], document["at_maximum"]) == (
        "measured",
        "discovered",
        False,
    )
    assert {"cpu", "torch", "commit", "time"} <= set(document["origin"])
    by_method = document["peak_by_method"]
    assert [*by_method] == ["predicted", "measured"]  # no estimate of what is no transformer
    assert by_method["predicted"] == pytest.approx(peaks[size], rel=0.3)
    assert f", measured {format_size(peaks[size])}\n" in first.out
    lines = first.out.splitlines()
    assert lines[0] == "mine:net: real training steps on the CPU, within 22.9 MiB"
    assert lines[1].split() == ["batch", "peak", "of", "limit", "seconds"]
    assert lines[2 + len(peaks)].startswith(f"device batch size {size}: peak ")
    assert lines[2 + len(peaks)].endswith(f"of 19.5 MiB (0.85 x 22.9 MiB); {size + 1} ran out of memory")
    assert (tmp_path / "out.png").read_bytes().startswith(b"\x89PNG")
    assert first.err == ""
    # A second run finds it in the cache, whatever the seed of its hashes.
    assert code_of(*MEASURE, "--json=-") == 0
    again = capsys.readouterr()
    assert json.loads(again.out)["device_batch_size"] == size
    assert f"device batch size {size}, measured earlier (--no-cache measures again): peak" in again.err
    # Another margin starts from the same measurements.
    assert code_of(*MEASURE, "--margin=0.5", "--json=-") == 0
    smaller = json.loads(capsys.readouterr().out)
    assert smaller["device_batch_size"] < size
    assert {**peaks}.items() <= {p["batch_size"]: p["peak_bytes"] for p in smaller["probes"]}.items()


@needs_linux
def test_no_cache_keeps_nothing(tmp_path: Path) -> None:
    assert code_of(*MEASURE, "--no-cache", "--max=2") == 0
    assert not (tmp_path / "cache").exists()


@needs_linux
def test_bounds_and_multiples(capsys: pytest.CaptureFixture[str]) -> None:
    assert code_of(*MEASURE, "--multiple-of=4", "--max=10", "--capacity=1GB") == 0
    assert "device batch size 8: peak" in (out := capsys.readouterr().out)
    assert "no larger one was asked about (--max)" in out


@needs_linux
def test_a_plan_for_the_global_batch_uses_what_fits(capsys: pytest.CaptureFixture[str]) -> None:
    plan = ["--global-batch=194", "--world-size=2", "--max=16", "--capacity=1GB", "--json=-"]
    assert code_of(*MEASURE, *plan) == 0
    told = capsys.readouterr()
    assert "  for a global batch of 194: Micro-batch: 14, Grad accum: 7, Effective: 194, " in told.err
    planned = json.loads(told.out)["plan"]
    assert planned["micro_batches"] == [14] * 6 + [13]
    assert (planned["target"], planned["global_batch_size"], planned["world_size"]) == (194, 194, 2)
    # A rank's samples are no multiple of 8: then the batch size has to divide them.
    assert code_of(*MEASURE, *plan, "--multiple-of=8") == 2
    assert capsys.readouterr().err == (
        "gputrain find-batch: no batch size from 1 to 16 is a multiple of 8 and divides 97; no other size "
        "does either\n"
    )


@needs_linux
def test_a_gpu_that_is_not_here_is_predicted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    predict = ["find-batch", "mine:net", "--capacity=1GB", "--global-batch=1024", "--max=900"]
    assert code_of(*predict, f"--json={tmp_path / 'out.json'}", f"--plot={tmp_path / 'out.svg'}") == 0
    first, answer, *rest = capsys.readouterr().out.splitlines()
    assert first == (
        "mine:net: predicting for a GPU with 953.7 MiB, by fake tensors; --measure runs real steps"
    )
    document = json.loads((tmp_path / "out.json").read_text())
    size, limit = document["device_batch_size"], document["limit_bytes"]
    peaks = {probe["batch_size"]: probe["peak_bytes"] for probe in document["probes"]}
    assert peaks[size] <= limit < peaks[size + 1]
    assert document["method"] == "predicted"
    # The context of a GPU that is not here is assumed, and said so.
    assert document["overhead_bytes"] > 0
    assert sum(document["by_category"].values()) + document["overhead_bytes"] == peaks[size]
    assert answer.startswith(f"predicted device batch size {size}: peak ")
    assert answer.endswith(f"; {size + 1} would not fit")
    assert "CUDA context 512.0 MiB (assumed)" in rest[0]
    assert any(line.startswith("  predicted, not measured: -") for line in rest)
    assert "predicted" in (tmp_path / "out.svg").read_text()
    assert not (tmp_path / "cache").exists()


@needs_linux
def test_an_estimate_stands_beside_a_prediction(capsys: pytest.CaptureFixture[str]) -> None:
    reference = "pytest_gputrain.reference.gpt:case"
    assert code_of("find-batch", reference, "--capacity=1GB", "--max=8", "--json=-") == 0
    told = capsys.readouterr()
    assert [*json.loads(told.out)["peak_by_method"]] == ["estimate", "predicted"]
    assert "  the peak by method: estimate " in told.err


@needs_linux
def test_a_prediction_that_nothing_fits(capsys: pytest.CaptureFixture[str]) -> None:
    assert code_of("find-batch", "mine:net", "--capacity=660MB", "--margin=0.85") == 1
    line = capsys.readouterr().out.splitlines()[1]
    assert line.startswith(
        "net does not fit: batch size 1 is predicted not to fit within 535.0 MiB (0.85 x 629.4 MiB); most "
    )


@needs_linux
def test_a_prediction_for_less_than_cuda_itself_takes(capsys: pytest.CaptureFixture[str]) -> None:
    assert code_of("find-batch", "mine:net", "--capacity=40MB") == 1
    _, first, second, *_ = capsys.readouterr().out.splitlines()
    assert first == (
        "net does not fit: the CUDA context alone takes 512.0 MiB (assumed) of 32.4 MiB (0.85 x 38.1 MiB); "
        "give the capacity of a whole GPU, or --device cpu to run real steps within so little"
    )
    assert second.startswith("  at batch size 1: ")


@needs_linux
def test_what_fake_tensors_cannot_run_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert code_of("find-batch", "mine:numpy", "--capacity=80GB") == 1
    told = capsys.readouterr()
    assert told.err.startswith("gputrain find-batch: mine:numpy: cannot be predicted: ")
    assert told.err.endswith("; --measure runs real steps\n")


@needs_linux
def test_a_model_that_does_not_fit_says_what_memory_is_for(capsys: pytest.CaptureFixture[str]) -> None:
    assert code_of(*MEASURE, "--capacity=1.2MB", "--margin=1") == 1
    out = capsys.readouterr().out.splitlines()
    line = next(line for line in out if line.startswith("net does not fit"))
    assert line.startswith(
        "net does not fit: batch size 1 runs out of memory within 1.1 MiB (1 x 1.1 MiB); most is for "
    )
    assert "; what helps: " in line
    assert line.endswith(", or more memory")


@needs_linux
def test_an_exception_of_the_case_is_not_out_of_memory(capsys: pytest.CaptureFixture[str]) -> None:
    assert code_of("find-batch", "mine:type_error", "--device=cpu", "--max=4") == 1
    told = capsys.readouterr()
    first, second, *rest = told.err.splitlines()
    assert first == (
        "gputrain find-batch: mine:type_error: raised TypeError: unsupported operand   at mine.py:20 in "
        "wrong; that is not out of memory"
    )
    assert second == "  in the probe after batch size 1"
    assert not any("pytest_gputrain/" in line for line in rest if line.startswith("  File"))
    assert "device batch size" not in told.out


@needs_linux
def test_a_crash_ends_the_case_and_not_the_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert code_of("find-batch", "mine:crash", "--device=cpu") == 1
    told = capsys.readouterr()
    assert "CRASHED after" in told.err
    assert "rank 0 was killed by SIGKILL" in told.err
    assert told.err.startswith("gputrain find-batch: mine:crash: CRASHED")


@needs_linux
def test_bad_cases_are_bad_input(capsys: pytest.CaptureFixture[str]) -> None:
    assert code_of("find-batch", "mine:two") == 2
    assert capsys.readouterr() == (
        "",
        "gputrain find-batch: mine:two is 2 cases (net, crash); name one of them\n",
    )
    assert code_of("find-batch", "mine:nett") == 2
    assert capsys.readouterr() == (
        "", "gputrain find-batch: case: mine has no attribute 'nett'; did you mean net?\n"
    )  # fmt: skip


TOO_FEW = "no batch size from 1 to 5 is a multiple of 7; the nearest: 7"
A_PART = "is not legal; give a part of the memory above 0 and up to 1, such as 0.85"
BAD_INPUT = [
    (["find-batch"], "no case given; give MODULE:ATTR, such as my_project.cases:gpt"),
    (["find-batch", "mine"],
     "case: 'mine' is not MODULE:ATTR; give \"package.module:attribute\""),
    ([*MEASURE, "--capacity=80"], None),
    ([*MEASURE, "--capacity=lots"], None),
    (["find-batch", "mine:net", "--predict"], '--predict needs the memory to predict for; give --capacity, '
     'such as "80GB"'),
    (["find-batch", "mine:net", "--device=cuda"], None),
    ([*MEASURE, "--min=9", "--max=8"], "--min 9 is above --max 8; give 1 <= MIN <= MAX"),
    ([*MEASURE, "--global-batch=10", "--world-size=3"], None),
    ([*MEASURE, "--multiple-of=7", "--max=5"], TOO_FEW),
]  # fmt: skip


@pytest.mark.parametrize(("arguments", "message"), BAD_INPUT)
def test_bad_input_is_one_line(
    arguments: list[str], message: str | None, capsys: pytest.CaptureFixture[str]
) -> None:
    assert code_of(*arguments) == 2
    told = capsys.readouterr()
    assert told.out == ""
    assert told.err.startswith("gputrain find-batch: ")
    assert told.err.count("\n") == 1
    if message is not None:
        assert told.err == f"gputrain find-batch: {message}\n"


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("--margin=1.5", f"--margin: '1.5' {A_PART}"),
        ("--margin=0", f"--margin: '0' {A_PART}"),
        ("--eval-factor=-1", "--eval-factor: '-1' is not legal; give a factor of 0 (no evaluation) or more"),
        ("--max=0", "--max: '0' is not legal; give a whole number of 1 or more"),
        ("--plot=ladder.pdf", "--plot: 'ladder.pdf' is not legal; give a file that ends in .png or .svg"),
        ("--plot=no/a.png", "--plot: 'no/a.png' is not legal; give a file in a folder that is there"),
        ("--json=.", "--json: '.' is a folder; give a file, such as out.json"),
        ("--cache-dir=mine.py", "--cache-dir: 'mine.py' is not legal; give a folder, there or not yet there"),
    ],
)  # fmt: skip
def test_bad_options(option: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert code_of(*MEASURE, option) == 2
    assert capsys.readouterr() == (
        "", f"gputrain find-batch: argument {message}; see gputrain find-batch --help\n"
    )  # fmt: skip


def test_a_file_that_cannot_be_written_is_refused_before_the_work(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*arguments: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", refuse)
    assert code_of(*MEASURE, "--json=out.json") == 2
    assert capsys.readouterr() == (
        "",
        "gputrain find-batch: argument --json: 'out.json' cannot be written (Permission denied); give "
        "another file; see gputrain find-batch --help\n",
    )


def test_trying_a_file_leaves_it_as_it_was(tmp_path: Path) -> None:
    from pytest_gputrain.cli.arguments import output_file

    (tmp_path / "there").write_text("mine")
    for name in ("there", "new"):
        output_file(str(tmp_path / name))
    assert (tmp_path / "there").read_text() == "mine"
    assert not (tmp_path / "new").exists()


def test_a_plot_without_matplotlib_is_refused_before_the_work(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pytest_gputrain.report.ladder_plot.missing", lambda: "a plot needs matplotlib")
    assert code_of(*MEASURE, "--plot=out.png") == 2
    assert "argument --plot: a plot needs matplotlib" in capsys.readouterr().err


@contextlib.contextmanager
def on_a_terminal(*arguments: str, environ: dict[str, str]) -> Iterator[tuple[subprocess.Popen[bytes], int]]:
    ours, theirs = pty.openpty()
    child = subprocess.Popen(
        [sys.executable, "-m", "pytest_gputrain", *arguments],
        env={**os.environ, "PYTHONPATH": str(ROOT), **environ},
        stdin=subprocess.DEVNULL,
        stdout=theirs,
        stderr=theirs,
    )
    os.close(theirs)
    try:
        yield child, ours
    finally:
        os.close(ours)
        child.kill()
        child.wait()


def read_all(file: int) -> str:
    data = b""
    with contextlib.suppress(OSError):  # EIO: the other end is closed
        while part := os.read(file, 4096):
            data += part
    return data.decode()


@needs_linux
@pytest.mark.slow
@pytest.mark.parametrize(("ci", "moves"), [("", True), ("true", False)], ids=["terminal", "ci"])
def test_progress_on_a_terminal_and_plain_lines_in_ci(ci: str, moves: bool) -> None:
    environ = {"CI": ci, "TERM": "xterm"}
    with on_a_terminal(*MEASURE, "--no-cache", "--max=2", environ=environ) as (child, terminal):
        out = read_all(terminal)
        assert child.wait(timeout=100) == 0
    assert "device batch size 2: peak" in out
    assert (re.search(r"\r\x1b\[K  [a-z][^\r\n]*, \d+ s", out) is not None) is moves
    assert ("\x1b" in out) is moves
