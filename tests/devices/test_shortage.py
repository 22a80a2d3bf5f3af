"""The words in which a lack of GPUs is told."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from pytest_gputrain.devices import describe_found, shortage

from .conftest import Card, FakeNvml, error

UseNvml = Callable[[FakeNvml], FakeNvml]
HERE = {"PATH": "/nowhere"}


def test_one_real_gpu(use_nvml: UseNvml) -> None:
    use_nvml(FakeNvml([Card("GPU-1")]))
    assert shortage(1, None, HERE) is None
    assert shortage(2, None, HERE) == "needs 2 GPUs, found 1 (NVIDIA H200, by NVML)"


def test_no_driver(use_nvml: UseNvml, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pytest_gputrain.devices.probes.DEVICE_NODES", ())
    use_nvml(FakeNvml([], error("NVMLError_DriverNotLoaded", "")))
    expected = "needs 1 GPU, found 0 by NVML (the NVIDIA driver is installed but not loaded)"
    assert shortage(1, None, HERE) == expected


def test_several_kinds(use_nvml: UseNvml) -> None:
    use_nvml(FakeNvml([Card("GPU-1"), Card("GPU-2", "NVIDIA T4", 15 * 2**30), Card("GPU-3")]))
    assert describe_found(HERE) == "3 (2 x NVIDIA H200, NVIDIA T4, by NVML)"
    assert shortage(3, "80GB", HERE) == (
        "needs 3 GPUs with 80GB each (74.5 GiB), "
        "found 3 (2 x NVIDIA H200 140.4 GiB, NVIDIA T4 15.0 GiB, by NVML), 2 of them that large"
    )
    assert shortage(2, "80GB", HERE) is None


def test_hidden_gpus(use_nvml: UseNvml) -> None:
    use_nvml(FakeNvml([Card("GPU-1"), Card("GPU-2")]))
    hidden = {**HERE, "CUDA_VISIBLE_DEVICES": ""}
    assert shortage(1, None, hidden) == "needs 1 GPU, found 0 (2 hidden by CUDA_VISIBLE_DEVICES='', by NVML)"
    assert shortage(1, 10**9, hidden) == (
        "needs 1 GPU with 953.7 MiB, found 0 (2 hidden by CUDA_VISIBLE_DEVICES='', by NVML)"
    )


def test_memory_that_is_not_told_is_not_enough(use_nvml: UseNvml) -> None:
    use_nvml(FakeNvml([Card("GPU-1", memory=None)]))
    assert shortage(1, "1GB", HERE) is not None


def test_memory_that_is_no_size() -> None:
    with pytest.raises(ValueError, match="'lots' is not a size above 0"):
        shortage(1, "lots", {"GPUTRAIN_FAKE_GPUS": "1"})


def test_a_gpu_named_twice(use_nvml: UseNvml) -> None:
    use_nvml(FakeNvml([Card("GPU-1"), Card("GPU-2", slices=[Card("MIG-2a"), Card("MIG-2b")])]))
    assert shortage(1, None, {**HERE, "CUDA_VISIBLE_DEVICES": "0,GPU-1"}) == (
        "needs 1 GPU, found 0 (CUDA_VISIBLE_DEVICES='0,GPU-1' names GPU 0 twice, so CUDA shows none: "
        "name each once, by NVML)"
    )
    assert shortage(1, None, {**HERE, "CUDA_VISIBLE_DEVICES": "MIG-2a,1"}) == (
        "needs 1 GPU, found 0 (CUDA_VISIBLE_DEVICES='MIG-2a,1' names MIG-2a twice, so CUDA shows none: "
        "name each once, by NVML)"
    )


def test_a_driver_without_a_gpu(use_nvml: UseNvml) -> None:
    use_nvml(FakeNvml([]))
    assert shortage(1, None, HERE) == (
        "needs 1 GPU, found 0 by NVML (driver 580.95.05 is loaded but shows no GPU)"
    )
