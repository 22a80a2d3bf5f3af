"""The training script as a branch of a sweep: its configuration, its tokens, its own rate."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from pytest_gputrain.batch.accumulation import plan_accumulation
from pytest_gputrain.reference import train_options
from pytest_gputrain.reference.train_length import length_of
from pytest_gputrain.sweep import plan_branches, write_configs
from tests.reference.test_train import Run

MODEL = ("--device=cpu", "--depth=1", "--width=32", "--sequence_length=16")


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def config(tmp_path: Path) -> Path:
    """k=2 of a base batch of 3: 6 sequences in micro-batches of 3, 4 steps of which the last has 2."""
    plan = plan_branches(
        k_values=[2], base_batch=3, base_lr=0.02, block_size=16, tokens=20 * 16 + 5, max_device_batch=4
    )
    write_configs(plan, tmp_path / "configs")
    return tmp_path / "configs" / "branch_k2.py"


def test_a_branch_goes_on_from_a_checkpoint_at_its_own_rate(
    tmp_path: Path, config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = Run(capsys, *MODEL, "--steps=2", "--lr=0.5", "--out", tmp_path / "base.pt")
    run = Run(
        capsys, "--device=cpu", "--config", config, "--checkpoint", tmp_path / "base.pt",
        "--out", tmp_path / "branch.pt",
    )  # fmt: skip
    assert base.code == run.code == 0, run.err
    names = ("tokens", "steps", "total_batch_size", "accumulation_steps")
    assert [run.metrics[name] for name in names] == [320, 4, 6, 2]
    rates = [float(line.split(" | lr ")[1].split()[0]) for line in run.lines if line.startswith("step")]
    assert max(rates) == pytest.approx(0.02 * 2**0.5, rel=1e-3)
    saved = torch.load(tmp_path / "branch.pt", weights_only=True)
    assert (saved["step"], saved["tokens"]) == (2 + 4, base.metrics["tokens"] + 320)


def test_options_go_before_the_configuration(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shape = ("--device=cpu", "--depth=1", "--width=32")  # the length of a sequence comes with it
    run = Run(capsys, *shape, "--config", config, "--steps=1", "--total_batch_size=2", "--lr=0.25")
    assert (run.metrics["tokens"], run.metrics["total_batch_size"]) == (32, 2)
    assert "| lr 2.500e-01 |" in run.out


def test_branches_are_evaluated_on_the_same_samples(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """So that their losses compare: as far as it goes, the device batch size changes nothing."""
    shape = ("--device=cpu", "--depth=1", "--width=32", "--steps=1", "--total_batch_size=6")
    found = [
        Run(capsys, *shape, "--config", config, f"--device_batch_size={size}", "--eval_samples=7").metrics
        for size in (2, 6)
    ]
    assert found[0]["eval_loss"] == pytest.approx(found[1]["eval_loss"], rel=1e-6)


def test_names_of_options_may_be_added_by_hand(config: Path) -> None:
    config.write_text(config.read_text() + "\nseed = 7\noptimizer = 'sgd'\ncheckpointing = True\n")
    options = train_options.parse(["--config", str(config)])
    assert (options.seed, options.optimizer, options.checkpointing) == (7, "sgd", True)
    assert (options.lr, options.tokens) == (0.02 * 2**0.5, 320)


@pytest.mark.parametrize(
    ("added", "arguments", "message"),
    [
        ("dpeth = 3", [], "dpeth is no option of this script; take it out"),
        ("optimizer = 'muon'", [], "optimizer is 'muon'; legal are adamw, sgd"),
        ("seed = -1", [], "argument --seed: '-1' is not a whole number from 0 up"),
        (
            "",
            ["--sequence_length=32"],
            "--config counts sequences of 16 tokens, the model takes 32; plan again",
        ),
        ("", ["--world_size=2"], "--config is for 2 ranks, here are 1; start as many, or plan again with"),
        (
            "",
            ["--steps=2", "--tokens=64"],
            "--steps and --tokens both say how long to train; give one of them",
        ),
        ("", ["--tokens=3"], "--tokens 3 is less than a sample of 16 on each of 1 ranks; give 16 or more"),
        ("x = = 1", [], "invalid syntax"),
    ],
)
def test_what_cannot_be_is_one_line(
    config: Path, capsys: pytest.CaptureFixture[str], added: str, arguments: list[str], message: str
) -> None:
    config.write_text(f"{config.read_text()}\n{added}\n")
    run = Run(capsys, "--device=cpu", "--depth=1", "--width=32", "--config", config, *arguments)
    assert run.code == 2
    assert message in run.err and run.err.count("\n") == 1


@pytest.mark.parametrize("ranks", [1, 2, 3])
@pytest.mark.parametrize("total", [6, 12])
def test_a_budget_is_met_exactly_whatever_the_batch(ranks: int, total: int) -> None:
    for tokens in range(ranks * 4, 400):
        options = train_options.parse([f"--tokens={tokens}"])
        length = length_of(options, plan_accumulation(total, 2, ranks), 4)
        assert length.tokens == tokens // 4 // ranks * ranks * 4
        assert sum(length.tokens_of(number) for number in range(1, length.steps + 1)) == length.tokens
        assert 0 < length.last_plan.global_batch_size <= total
