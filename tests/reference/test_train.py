"""The training script in one process: its data, its options, its stages and checkpoints, its arithmetic."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from pytest_gputrain import OutOfMemory, TrainingCase
from pytest_gputrain.reference import (
    sft_data,
    train,
    train_checkpoint,
    train_data,
    train_loop,
    train_options,
    train_parser,
)

SMALL = ("--device=cpu", "--depth=1", "--width=32", "--sequence_length=16", "--steps=3")


@pytest.fixture(autouse=True)
def _one_thread() -> Any:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class Run:
    """What ``main`` printed."""

    def __init__(self, capsys: pytest.CaptureFixture[str], *arguments: object) -> None:
        capsys.readouterr()
        self.code = train.main([*map(str, arguments)])
        self.out, self.err = capsys.readouterr()
        self.lines = self.out.strip().splitlines()
        self.metrics: dict[str, Any] = json.loads(self.lines[-1]) if self.code == 0 else {}
        self.losses = [float(found) for found in re.findall(r"^step .* loss (\S+)", self.out, re.MULTILINE)]


def test_one_line_a_step_and_a_last_line_of_json(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    run = Run(capsys, *SMALL, "--eval-every", 2, "--metrics", tmp_path / "new" / "metrics.json")
    assert [line.split(" | ")[0] for line in run.lines if line.startswith(("step", "eval"))] == [
        "step 1/3",
        "step 2/3",
        "eval at step 2",
        "step 3/3",
        "eval at step 3",
    ]
    assert run.metrics["tokens"] == 3 * 8 * 16
    assert run.metrics["final_loss"] < run.metrics["first_loss"]
    assert min(run.metrics[f"{part}_seconds"] for part in ("start", "training", "evaluation")) > 0
    *steps, last = map(json.loads, (tmp_path / "new" / "metrics.json").read_text().splitlines())
    assert last == run.metrics
    assert [(step["step"], step["tokens"]) for step in steps] == [(1, 128), (2, 256), (3, 384)]
    assert steps[-1]["loss"] == last["final_loss"]


@pytest.mark.parametrize("dataset", ["synthetic", "text"])
@pytest.mark.parametrize("stage", train_parser.STAGES)
def test_a_sample_is_the_same_in_every_batch(stage: str, dataset: str) -> None:
    samples = train_data.Samples(stage, dataset, 16, seed=1)
    whole = samples.batch(3, 0, 6, "cpu")
    parts = [samples.batch(3, first, 2, "cpu") for first in (0, 2, 4)]
    for name in ("inputs", "targets"):
        assert whole[name].shape == (6, 16)
        assert torch.equal(whole[name], torch.cat([part[name] for part in parts]))
        assert not torch.equal(whole[name], samples.batch(4, 0, 6, "cpu")[name])
    assert not torch.equal(whole["inputs"], samples.batch(train_data.EVALUATION, 0, 6, "cpu")["inputs"])


def test_documents_have_padding_and_questions_that_do_not_count() -> None:
    batch = train_data.Samples("sft", "text", 32, seed=1).batch(0, 0, 64, "cpu")
    counts = (batch["targets"] != sft_data.MASKED).sum(dim=1)
    assert len(counts.unique()) > 8
    assert counts.min() > 0
    assert (batch["targets"][:, 0] == sft_data.MASKED).all()
    padded = batch["inputs"] == sft_data.PADDING  # the text has no byte of 0
    assert padded.any()
    assert (batch["targets"][padded] == sft_data.MASKED).all()
    assert sft_data.num_targets(batch) == counts.sum()


def test_the_text_is_prose_and_some_of_it_is_held_out() -> None:
    assert train_data.TEXT.stat().st_size > 30_000
    train_data.TEXT.read_text(encoding="utf-8")
    training = train_data.Samples("base", "text", 64, seed=1).batch(0, 0, 64, "cpu")["inputs"]
    held_out = bytes(train_data.text_tokens()[-int(len(train_data.text_tokens()) * 0.1) :].tolist())
    assert not any(bytes(row.tolist()) in held_out for row in training)


@pytest.mark.parametrize("stage", ["base", "sft"])
@pytest.mark.parametrize("device_batch_size", [1, 3, 4])
def test_the_device_batch_size_changes_no_loss(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, stage: str, device_batch_size: int
) -> None:
    """Documents too, whose lengths are not equal."""
    options: list[object] = [
        "--device=cpu",
        "--steps=4",
        "--lr=0.01",
        "--total_batch_size=12",
        f"--stage={stage}",
    ]
    if stage == "base":
        options += ["--depth=1", "--width=32", "--sequence_length=16"]
    else:
        Run(capsys, *SMALL, "--out", tmp_path / "base.pt")
        options += ["--checkpoint", tmp_path / "base.pt"]
    whole = Run(capsys, *options, "--device_batch_size=12")
    parts = Run(capsys, *options, f"--device_batch_size={device_batch_size}")
    assert parts.metrics["accumulation_steps"] == 12 // device_batch_size
    assert parts.losses == pytest.approx(whole.losses, rel=1e-5)
    assert len(set(whole.losses)) == 4


def test_the_stages_follow_each_other(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    base, mid = tmp_path / "base.pt", tmp_path / "deep" / "mid.pt"
    Run(capsys, *SMALL, "--dataset=text", "--lr=0.03", "--device_batch_size=4", "--out", base)
    run = Run(
        capsys,
        "--device=cpu",
        "--stage=mid",
        "--dataset=text",
        "--steps=2",
        "--device_batch_size=4",
        "--checkpoint",
        base,
        "--out",
        mid,
    )
    assert "exceeds" not in run.out
    assert run.metrics["first_loss"] < 5.5  # of a model that has learnt; a new one starts at log 256 = 5.545
    last = Run(
        capsys, "--device=cpu", "--stage=sft", "--steps=2", "--device_batch_size=5", "--checkpoint", mid
    )
    assert "stage sft: device_batch_size=5 exceeds the pretraining stage's 4" in last.out
    written = train_checkpoint.load(mid)
    assert (written.stage, written.step, written.tokens) == ("mid", 5, 5 * 4 * 16)
    assert (written.device_batch_size, written.pretraining_batch_size) == (4, 4)
    assert written.config["sequence_length"] == 16


def test_a_stage_goes_on_with_its_optimizer_at_the_rate_that_is_asked_for(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    first, second = tmp_path / "first.pt", tmp_path / "second.pt"
    Run(capsys, *SMALL, "--out", first)
    run = Run(capsys, "--device=cpu", "--steps=1", "--lr=0.004", "--checkpoint", first, "--out", second)
    assert "lr 4.000e-03" in run.out
    before, after = train_checkpoint.load(first).optimizer, train_checkpoint.load(second).optimizer
    assert [int(state["step"]) for state in after["state"].values()] == [4] * len(before["state"])
    assert after["param_groups"][0]["lr"] == pytest.approx(0.004)
    assert before["param_groups"][0]["lr"] == pytest.approx(1e-4)  # the end of its cosine


def test_training_twice_is_the_same(capsys: pytest.CaptureFixture[str]) -> None:
    first, second = (Run(capsys, *SMALL, "--dropout=0.2", "--dtype=bfloat16") for _ in range(2))
    assert first.losses == second.losses


def test_a_budget_is_enforced(capsys: pytest.CaptureFixture[str]) -> None:
    run = Run(capsys, *SMALL, "--memory_budget=1GB")
    assert 2**16 < run.metrics["peak_bytes"] < 2**26
    with pytest.raises(OutOfMemory):
        train.main([*SMALL, f"--memory_budget={run.metrics['peak_bytes'] - 1}"])
    assert Run(capsys, *SMALL, f"--memory_budget={run.metrics['peak_bytes']}").code == 0


def test_a_users_case_is_trained(capsys: pytest.CaptureFixture[str]) -> None:
    run = Run(
        capsys,
        "--device=cpu",
        "--steps=3",
        "--case=pytest_gputrain.reference.opt:case",
        "--total-batch-size=16",
    )
    assert run.metrics["case"] == "opt"
    assert run.metrics["tokens"] == 3 * 16 * 32
    assert "lr 1.000e-03" in run.out  # its optimizer's own


def own_step(model: Any, optimizer: Any, micro_batches: list[Any]) -> torch.Tensor:
    loss = sum(model(micro_batch).mean() for micro_batch in micro_batches)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return torch.full_like(loss.detach(), 7.0)


def test_a_case_trains_with_its_own_step(capsys: pytest.CaptureFixture[str]) -> None:
    case = TrainingCase(
        name="own",
        model=lambda: torch.nn.Linear(3, 1),
        batch=lambda batch_size, device: torch.randn(batch_size, 3, device=device),
        loss=lambda model, batch: model(batch).mean(),
        step=own_step,
    )
    capsys.readouterr()
    assert train.main(["--device=cpu", "--steps=2"], case=case) == 0
    metrics = json.loads(capsys.readouterr().out.strip().splitlines()[-1])
    assert metrics["final_loss"] == 7.0
    assert metrics["tokens"] == 2 * 8  # samples, where a sample has no tokens


def raises_a_bug(model: Any, batch: Any) -> torch.Tensor:
    raise ValueError("a bug of the user")


def test_a_users_own_error_is_raised_where_it_is() -> None:
    case = TrainingCase(
        name="bug",
        model=lambda: torch.nn.Linear(3, 2),
        batch=lambda batch_size, device: torch.randn(batch_size, 3, device=device),
        loss=raises_a_bug,
    )
    options = ["--device=cpu", "--steps=2", "--auto_batch_size", "--memory_budget=1MB"]
    with pytest.raises(ValueError, match="a bug of the user") as caught:
        train.main(options, case=case)
    assert caught.traceback[-1].name == "raises_a_bug"


def test_the_schedule() -> None:
    rates = [train_loop.schedule(number, 20) for number in range(1, 21)]
    assert rates[:3] == pytest.approx([0.5, 1.0, 0.9932], abs=1e-4)
    assert rates[-1] == pytest.approx(0.1)
    assert train_loop.schedule(1, 1) == 1.0
    assert [train_loop.schedule(number, 2, warmup=0) for number in (1, 2)] == pytest.approx([0.55, 0.1])


def test_both_spellings_and_flags_with_a_value() -> None:
    dashes = train_options.parse(
        ["--auto-batch-size", "--total-batch-size=64", "--memory-budget", "2GB,1GiB"]
    )
    underscores = train_options.parse(
        ["--auto_batch_size=true", "--total_batch_size", "64", "--memory_budget=2GB,1GiB"]
    )
    assert dashes == underscores
    assert [dashes.budget(rank) for rank in range(3)] == [2 * 10**9, 2**30, 2**30]
    assert not train_options.parse(["--auto_batch_size=False"]).auto_batch_size


WRONG = {
    "--steps=0": "argument --steps/--num_iterations/--num-iterations: '0' is not a whole number from 1 up",
    "--stage=rl": "argument --stage: invalid choice: 'rl' (choose from",
    "--lr=-1": "argument --lr: '-1' is not a number above 0",
    "--memory_budget=2GB,lots": "'2GB,lots' is not a size above 0 such as",
    "--memory_budget=1GB,80": "argument --memory_budget/--memory-budget: 80 is 80 bytes; legal is 64.0 KiB",
    "--batch_size_margin=1.5": "/--batch-size-margin: '1.5' is not a number above 0 and up to 1",
    "--auto_batch_size=maybe": "'maybe' is not true or false",
    "--stepz=3": "unrecognized arguments: --stepz=3",
    "--stage=mid": "--stage mid starts from the base stage's checkpoint; give --checkpoint FILE",
    "--width=40": "--width 40 is not a multiple of 32, a head's width",
    "--checkpoint=none.pt": "--checkpoint none.pt: there is no such file; --out of an earlier run writes one",
    "--out=/proc/no/file.pt": "--out /proc/no/file.pt: cannot be written; give a file in a folder that can",
    "--dataset=text --sequence_length=9999": "--sequence_length 9999 is too long for the text, of which",
    "--case=nothing": "--case: 'nothing' is not MODULE:ATTR",
    "--case=pytest_gputrain.reference.gpt:case --depth=3": "--depth 3 is for the script's own model",
}


@pytest.mark.parametrize("arguments", WRONG)
def test_what_cannot_be_is_one_line(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: str
) -> None:
    monkeypatch.chdir(tmp_path)
    run = Run(capsys, "--device=cpu", *arguments.split())
    assert run.code == 2
    assert run.out == ""
    assert run.err.startswith("train: ")
    assert run.err.count("\n") == 1
    assert WRONG[arguments] in run.err


def test_foreign_checkpoints(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = tmp_path / "file.pt"
    path.write_bytes(b"no checkpoint")
    assert f"--checkpoint {path}: cannot be read (" in Run(capsys, "--checkpoint", path).err
    torch.save({"model": {}}, path)
    assert "not written by this script; give a file that --out wrote" in Run(capsys, "--checkpoint", path).err
    torch.save({"format": train_checkpoint.FORMAT, "model": {}}, path)
    assert f"--checkpoint {path}: fields are missing (" in Run(capsys, "--checkpoint", path).err
    Run(capsys, *SMALL, "--out", path)
    changed = Run(capsys, "--device=cpu", "--depth=2", "--checkpoint", path)
    assert changed.err == "train: --depth 2 is not the checkpoint's 1; leave it out\n"
    assert [there.name for there in tmp_path.iterdir()] == ["file.pt"]
