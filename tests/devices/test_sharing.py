"""Which GPUs ranks could share, and how that is called."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from pytest_gputrain.devices.sharing import gpus_to_share, label, lacking

from .conftest import Card, FakeNvml

UseNvml = Callable[[FakeNvml], FakeNvml]
HERE = {"PATH": "/nowhere"}


@pytest.mark.parametrize(
    ("fake", "visible", "ranks", "memory", "number"),
    [
        ("0", None, 2, None, 0),  # nothing to share
        ("1", None, 2, None, 1),
        ("2", None, 2, None, 0),  # a GPU each: no need to
        ("2", None, 3, None, 2),
        ("2", "1", 2, None, 1),
        ("2", "", 2, None, 0),
        ("2", "1,1", 2, None, 0),
        ("1x80GB", None, 2, "40GB", 1),  # both must fit on the one
        ("1x80GB", None, 2, "41GB", 0),
        ("2x80GB", None, 4, "40GB", 2),
        ("2x80GB", None, 3, "80GB", 0),
    ],
)
def test_which_gpus(fake: str, visible: str | None, ranks: int, memory: str | None, number: int) -> None:
    environ = {"GPUTRAIN_FAKE_GPUS": fake} | ({} if visible is None else {"CUDA_VISIBLE_DEVICES": visible})
    assert len(gpus_to_share(ranks, memory, environ)) == number


def test_the_way_out_is_named_where_there_is_one(use_nvml: UseNvml) -> None:
    use_nvml(FakeNvml([Card("GPU-1")]))
    assert lacking(2, None, HERE, share_gpu=False) == (
        "needs 2 GPUs, found 1 (NVIDIA H200, by NVML); --share-gpu lets ranks share it through gloo"
    )
    assert lacking(2, None, HERE, share_gpu=True) is None
    assert lacking(1, None, HERE, share_gpu=False) is None


def test_several_are_them(use_nvml: UseNvml) -> None:
    use_nvml(FakeNvml([Card("GPU-1"), Card("GPU-2", "NVIDIA T4")]))
    assert lacking(4, None, HERE, share_gpu=False) == (
        "needs 4 GPUs, found 2 (NVIDIA H200, NVIDIA T4, by NVML); --share-gpu lets ranks share them through "
        "gloo"
    )
    assert label(4, gpus_to_share(4, None, HERE)) == (
        "4 ranks shared 2 GPUs (NVIDIA H200, NVIDIA T4) through gloo: not a multi-GPU result"
    )


def test_memory_that_sharing_cannot_give(use_nvml: UseNvml) -> None:
    use_nvml(FakeNvml([Card("GPU-1")]))
    lack = (
        "needs 2 GPUs with 80GB each (74.5 GiB), found 1 (NVIDIA H200 140.4 GiB, by NVML), "
        "1 of them that large"
    )
    assert lacking(2, "80GB", HERE, share_gpu=False) == lack
    assert lacking(2, "80GB", HERE, share_gpu=True) == lack


@pytest.mark.parametrize("share_gpu", [True, False])
def test_no_gpu_no_way_out(share_gpu: bool) -> None:
    assert lacking(2, None, {"GPUTRAIN_FAKE_GPUS": "0"}, share_gpu=share_gpu) == (
        "needs 2 GPUs, found 0 by GPUTRAIN_FAKE_GPUS (GPUTRAIN_FAKE_GPUS=0)"
    )
