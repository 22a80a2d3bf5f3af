"""The most memory that each rank has held. Of a GPU only where there is one."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from pytest_gputrain import launch
from pytest_gputrain.report.launches import launch_of

MANY = 300 * 2**20


def program() -> None:
    import torch

    if os.environ["RANK"] == "1":
        torch.ones(MANY, dtype=torch.uint8)


def test_of_a_fresh_rank_the_kernel_tells() -> None:
    less, more = (rank.peak_bytes or 0 for rank in launch(program).ranks)
    assert less > 0
    assert more > less + MANY // 2


def test_of_a_rank_that_fails_too() -> None:
    ranks = launch(lambda: 1 / 0, world_size=1, check=False).ranks
    assert ranks[0].state == "failed"
    assert ranks[0].peak_bytes


def test_of_a_warm_rank_without_a_gpu_nothing_is_told() -> None:
    assert [rank.peak_bytes for rank in launch(program, isolation="warm").ranks] == [None, None]


def test_of_a_script_and_in_the_report(tmp_path: Path) -> None:
    script = tmp_path / "train.py"
    script.write_text("import torch")
    result = launch.torchrun(script)
    told = [rank.peak_bytes for rank in launch_of(result, None).ranks]
    assert told == [rank.peak_bytes for rank in result.ranks]
    assert min(one or 0 for one in told) > 0


@pytest.mark.requires_gpus(1)
def test_of_a_gpu_torchs_allocator_tells_each_call_its_own() -> None:
    def on_gpu(size: int) -> None:
        import torch

        torch.ones(size, dtype=torch.uint8, device="cuda")

    more, less = (
        launch(on_gpu, size, world_size=1, isolation="warm", device="cuda").ranks[0].peak_bytes or 0
        for size in (MANY, MANY // 4)
    )
    assert MANY // 4 <= less < MANY <= more < 2 * MANY
