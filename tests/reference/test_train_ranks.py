"""The training script on several ranks: the same losses as on one, by torchrun and by the launcher."""

from __future__ import annotations

import dataclasses
import itertools
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from pytest_gputrain import launch
from pytest_gputrain.launch import LaunchResult

pytestmark = pytest.mark.skipif("sys.platform != 'linux'", reason="launching ranks needs Linux")
SCRIPT = Path(__file__).parents[2] / "pytest_gputrain" / "reference" / "train.py"
SHAPE = ("--device=cpu", "--depth=1", "--width=32", "--sequence_length=16")
STEPS = (*SHAPE, "--steps=4", "--lr=0.01", "--total_batch_size=8", "--device_batch_size=2")


def losses(text: str) -> list[float]:
    return [float(found) for found in re.findall(r"^step .* loss (\S+)", text, re.MULTILINE)]


def train(*arguments: object, nproc: int, trace: bool | None = None) -> LaunchResult:
    return launch.torchrun(str(SCRIPT), *map(str, arguments), nproc=nproc, trace=trace)


@pytest.mark.parametrize(
    ("stage", "worlds"),
    [
        ("base", (2,)),
        pytest.param("base", (4,), marks=pytest.mark.slow),
        pytest.param("sft", (2, 4), marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_ranks_change_no_loss(tmp_path: Path, stage: str, worlds: tuple[int, ...]) -> None:
    options: tuple[object, ...] = STEPS
    if stage == "sft":
        train(*STEPS, "--out", tmp_path / "base.pt", nproc=2)
        options = (*STEPS[:1], *STEPS[4:], "--stage=sft", "--checkpoint", tmp_path / "base.pt")
    alone = losses(train(*options, nproc=1).ranks[0].stdout)
    assert len(set(alone)) == 4
    for nproc in worlds:
        result = train(*options, nproc=nproc)
        assert losses(result.ranks[0].stdout) == pytest.approx(alone, rel=1e-5)
        metrics = json.loads(result.ranks[0].stdout.splitlines()[-1])
        assert metrics["accumulation_steps"] == 4 // nproc
        assert all(losses(result.ranks[rank].stdout) == [] for rank in range(1, nproc))


def test_traced_from_start_to_end(tmp_path: Path) -> None:
    """What a user who asks where a script stops would do to it."""
    traced = train(*STEPS, "--out", tmp_path / "base.pt", "--eval_every=2", nproc=2, trace=True)
    assert losses(traced.ranks[0].stdout) == losses(train(*STEPS, nproc=2).ranks[0].stdout)


def count_reductions(device_batch_size: int) -> int:
    """In a rank: how many buckets were reduced while it trained 4 steps of 8 samples on 2 ranks."""
    from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
    from torch.nn.parallel import DistributedDataParallel

    from pytest_gputrain.reference import gpt, train

    reduced = itertools.count()

    def wrap(model: torch.nn.Module) -> torch.nn.Module:
        wrapped = DistributedDataParallel(model)
        # A lambda: the annotations of a function in a module like this one are text, which DDP refuses.
        wrapped.register_comm_hook(
            None, lambda group, bucket: (next(reduced), allreduce_hook(group, bucket))[1]
        )
        return wrapped

    arguments = [
        "--device=cpu",
        "--steps=4",
        "--total_batch_size=8",
        f"--device_batch_size={device_batch_size}",
    ]
    assert train.main(arguments, case=dataclasses.replace(gpt.gpt_case(1, width=32), wrap=wrap)) == 0
    return next(reduced)


def test_accumulating_costs_no_all_reduce() -> None:
    """Four micro-steps synchronise as often as one does: in each of 4 steps, once a bucket."""
    whole, parts = (launch(count_reductions, size, world_size=2).values for size in (4, 1))
    assert whole == parts
    assert whole[0] in (4, 8)


@pytest.mark.slow
def test_under_torchrun_itself(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", str(SCRIPT)]
    done = subprocess.run(
        [*command, *STEPS, "--metrics", str(tmp_path / "metrics.json")],
        cwd=SCRIPT.parents[2], capture_output=True, text=True, timeout=120, check=False,
        stdin=subprocess.DEVNULL,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert len(losses(done.stdout)) == 4
    assert json.loads((tmp_path / "metrics.json").read_text().splitlines()[-1])["world_size"] == 2


def test_out_of_memory_is_one_line_and_the_cause() -> None:
    """Not even one sample fits on the second rank; the launcher knows the exception all the same."""
    options = (*SHAPE, "--steps=2", "--auto_batch_size", "--memory_budget=1GB,70KB")
    result = launch.torchrun(str(SCRIPT), *options, nproc=2, check=False)
    assert "OutOfMemory" in str(result.cause)
    assert {rank.exit_code for rank in result.ranks} <= {1, None, -15}
    told = [line for rank in result.ranks for line in rank.stderr.splitlines()]
    assert told
    assert len(told) <= 2
    assert all(re.match(r"(\[rank[01]\]: )?train: .*(out of memory|OutOfMemory)", line) for line in told)


def test_a_total_that_ranks_do_not_share_is_one_line() -> None:
    result = launch.torchrun(str(SCRIPT), *SHAPE, "--total_batch_size=5", nproc=2, check=False)
    assert result.cause is not None
    assert result.ranks[result.cause.rank or 0].exit_code == 2
    told = {line for rank in result.ranks for line in rank.stderr.splitlines()}
    assert len(told) == 1
    assert "a global batch of 5 cannot be shared equally by 2 ranks" in told.pop()
