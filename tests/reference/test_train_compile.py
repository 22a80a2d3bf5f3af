"""The training script, compiled: one graph, the losses of the uncompiled run, checkpoints for both."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from pytest_gputrain import launch
from pytest_gputrain.reference import train_options
from pytest_gputrain.sweep import plan_branches, write_configs
from tests.reference.test_train import Run
from tests.reference.test_train_ranks import SCRIPT, losses

SHAPE = ("--device=cpu", "--depth=1", "--width=32", "--sequence_length=16")
COMPILED = ("--compile", "--compile_backend=eager", "--validate")
SAID = "[VALIDATION] ✓ Model is compiled"


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def stays_compiled(run: Run) -> dict[str, Any]:
    assert run.code == 0, run.err
    found: dict[str, Any] = run.metrics["validation"]
    assert SAID in run.lines
    assert "✗" not in run.out
    assert (found["is_compiled"], found["graphs"], found["recompiles"]) == (True, 1, 0)
    return found


def test_one_graph_whatever_the_loop_does(capsys: pytest.CaptureFixture[str]) -> None:
    """Accumulation whose last micro-batch is short, evaluation in larger batches, and a schedule."""
    how: tuple[str, ...] = (*SHAPE, "--steps=7", "--total_batch_size=10", "--device_batch_size=4")
    how += ("--lr=0.02", "--eval_every=2", "--eval_batch_factor=3")
    plain, run = Run(capsys, *how), Run(capsys, *how, *COMPILED)
    found = stays_compiled(run)
    assert run.losses == pytest.approx(plain.losses, rel=1e-5)
    assert run.metrics["eval_loss"] == pytest.approx(plain.metrics["eval_loss"], rel=1e-5)
    assert "[VALIDATION] Step 0 | Batch shape: torch.Size([4, 16]) x 3 micro-batches" in run.lines
    assert found["useful_share"] == pytest.approx(10 / 12)  # two rows fill the last micro-batch up
    assert run.metrics["tokens"] == plain.metrics["tokens"] == 7 * 10 * 16
    assert run.metrics["compiled"] and not plain.metrics["compiled"]


def test_a_checkpoint_goes_both_ways(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """From compiled to uncompiled and back, and the losses are those of whoever goes on."""
    first = (*SHAPE, "--steps=2", "--lr=0.02")
    Run(capsys, *first, *COMPILED, "--out", tmp_path / "compiled.pt")
    Run(capsys, *first, "--out", tmp_path / "plain.pt")
    saved = [torch.load(tmp_path / f"{name}.pt", weights_only=True) for name in ("compiled", "plain")]
    assert saved[0]["model"].keys() == saved[1]["model"].keys()
    assert not any("_orig_mod" in key or key.startswith("module.") for key in saved[0]["model"])
    then = ("--device=cpu", "--steps=2", "--lr=0.02")
    runs = [
        Run(capsys, *then, *how, "--checkpoint", tmp_path / f"{name}.pt")
        for name in ("compiled", "plain")
        for how in ((), COMPILED)
    ]
    for run in runs:
        assert run.losses == pytest.approx(runs[0].losses, rel=1e-5)


def test_documents_at_one_length_and_at_any(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """A later stage may be longer than the one before; padding to the longest compiles again and again."""
    Run(capsys, *SHAPE, "--steps=1", "--dataset=text", "--out", tmp_path / "base.pt")
    how: tuple[str, ...] = ("--device=cpu", "--stage=sft", "--dataset=text", "--max_seq_len=40")
    how += ("--device_batch_size=2",)
    how += ("--checkpoint", str(tmp_path / "base.pt"), "--steps=12", *COMPILED)
    run = Run(capsys, *how)
    found = stays_compiled(run)
    assert "[VALIDATION] Step 0 | Batch shape: torch.Size([2, 40])" in run.lines
    assert 0.2 < found["useful_share"] < 0.8
    changing = Run(capsys, *how, "--padding=longest")
    assert changing.code == 0
    assert changing.metrics["validation"]["recompiles"] > 3
    assert "✗ Step " in changing.out
    # The padding counts for nothing: the losses are the same.
    assert changing.losses == pytest.approx(run.losses, rel=1e-4)


def test_a_branch_whose_last_step_is_short(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    plan = plan_branches(
        k_values=[2], base_batch=3, base_lr=0.02, block_size=16, tokens=20 * 16, max_device_batch=4
    )
    write_configs(plan, tmp_path)
    how = ("--device=cpu", "--depth=1", "--width=32", "--config", str(tmp_path / "branch_k2.py"))
    plain, run = Run(capsys, *how), Run(capsys, *how, *COMPILED)
    stays_compiled(run)
    assert run.losses == pytest.approx(plain.losses, rel=1e-5)
    assert run.metrics["tokens"] == 320


@pytest.mark.nightly
def test_a_users_case_is_compiled_as_it_says(capsys: pytest.CaptureFixture[str]) -> None:
    run = Run(capsys, "--device=cpu", "--steps=2", "--case=pytest_gputrain.reference.opt:case", *COMPILED)
    assert run.metrics["validation"]["is_compiled"]
    assert SAID in run.lines


def test_a_budget_is_for_the_search(capsys: pytest.CaptureFixture[str]) -> None:
    """Where operations are watched, torch runs compiled code eager; the training then is not watched."""
    how = (*SHAPE, "--steps=1", "--auto_batch_size", "--memory_budget=1MB", "--max_batch_size=6")
    run = Run(capsys, *how, *COMPILED)
    stays_compiled(run)
    assert (
        "--memory_budget is for the search alone: compiled training on a CPU cannot be watched" in run.lines
    )
    assert run.metrics["device_batch_size"] == Run(capsys, *how).metrics["device_batch_size"]


@pytest.mark.skipif("sys.platform != 'linux'", reason="launching ranks needs Linux")
def test_two_ranks_compile_as_one(capsys: pytest.CaptureFixture[str]) -> None:
    how = (*SHAPE, "--steps=7", "--total_batch_size=12", "--device_batch_size=3", "--lr=0.02")
    result = launch.torchrun(str(SCRIPT), *how, "--compile", "--compile_backend=eager", "--validate", nproc=2)
    printed = result.ranks[0].stdout
    assert losses(printed) == pytest.approx(Run(capsys, *how).losses, rel=1e-5)
    assert SAID in printed.splitlines()
    assert " | rank 0 of 2\n" in printed
    assert "[VALIDATION]" not in result.ranks[1].stdout
    found = json.loads(printed.splitlines()[-1])["validation"]
    assert (found["is_compiled"], found["graphs"], found["recompiles"]) == (True, 1, 0)


def test_the_switch_may_be_in_the_environment(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GPUTRAIN_VALIDATE", "1")
    run = Run(capsys, *SHAPE, "--steps=1")
    assert "[VALIDATION] ✗ Model is not compiled: nothing was compiled; call torch.compile, and" in run.out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--padding=longest", "--padding longest is for --stage sft; here it is base"),
        ("--compile_backend=eager", "--compile_backend is for --compile; give both, or none"),
        ("--compile --compile_backend=nope", "--compile_backend: unknown compile backend 'nope'; torch "),
    ],
)
def test_what_cannot_be_is_one_line(capsys: pytest.CaptureFixture[str], arguments: str, message: str) -> None:
    run = Run(capsys, *SHAPE, *arguments.split())
    assert (run.code, run.out, run.err.count("\n")) == (2, "", 1)
    assert run.err.startswith(f"train: {message}")


def test_without_a_compiler_it_says_what_to_install(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    run = Run(capsys, *SHAPE, "--compile")
    assert run.code == 2
    assert run.err.startswith("train: --compile: inductor needs a C++ compiler, and there is none")


def test_the_options_of_a_compiled_run() -> None:
    options = train_options.parse(["--compile", "--compile-backend=aot_eager", "--max-seq-len=32"])
    assert (options.compile, options.compile_backend, options.sequence_length) == (True, "aot_eager", 32)
    assert options.padding == "max_seq_len" and not options.validate
