"""GPUs that nobody leases and that are in use all the same, by what NVML says."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from pytest_gputrain.devices import leases
from pytest_gputrain.devices.inventory import Gpu
from pytest_gputrain.devices.lease_folder import LeaseFolder
from pytest_gputrain.devices.lease_place import Request
from pytest_gputrain.devices.leases import GpusOccupied, acquire, holders

from .conftest import Card, FakeNvml, error


@pytest.fixture
def folder(tmp_path: Path) -> LeaseFolder:
    made = LeaseFolder(tmp_path / "leases")
    made.prepare()
    return made


CARDS = [Card(f"GPU-{letter * 4}", memory=80 * 2**30) for letter in "ab"]
REAL = tuple(Gpu(i, card.uuid, card.name, 80 * 2**30, False, "NVML") for i, card in enumerate(CARDS))


def test_memory_in_use_names_who_and_takes_another_gpu(
    folder: LeaseFolder, use_nvml: Callable[[FakeNvml], FakeNvml], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(leases, "OCCUPIED_DEADLINE", 0.1)
    use_nvml(FakeNvml(CARDS, used={"GPU-aaaa": 70 * 2**30}, users={"GPU-aaaa": [(os.getppid(), 70 * 2**30)]}))
    lease = acquire(folder, Request(1, REAL, "this test"), deadline=30)
    assert lease.gpus == REAL[1:]
    lease.release()
    with pytest.raises(GpusOccupied) as caught:
        acquire(folder, Request(2, REAL, "this test"), deadline=30)
    start = "needs 2 GPUs with free memory: GPU 0 (GPU-aaaa): 70.0 GiB of 80.0 GiB in use by pid"
    assert str(caught.value).startswith(f"{start} {os.getppid()} (")
    assert holders(folder) == []


def test_gpus_in_use_are_named_however_short_the_wait(
    folder: LeaseFolder, use_nvml: Callable[[FakeNvml], FakeNvml]
) -> None:
    use_nvml(FakeNvml(CARDS, used={"GPU-aaaa": 70 * 2**30}, users={"GPU-aaaa": [(os.getppid(), 70 * 2**30)]}))
    with pytest.raises(GpusOccupied, match=r"70\.0 GiB of 80\.0 GiB in use by pid"):
        acquire(folder, Request(2, REAL, "this test"), deadline=0.2)


def test_what_warm_ranks_hold_counts_as_free(
    folder: LeaseFolder, use_nvml: Callable[[FakeNvml], FakeNvml]
) -> None:
    with subprocess.Popen(["sleep", "300"]) as child:
        use_nvml(FakeNvml(CARDS, used={"GPU-aaaa": 9 * 2**30}, users={"GPU-aaaa": [(child.pid, 9 * 2**30)]}))
        try:
            acquire(folder, Request(2, REAL, "this test"), deadline=30).release()
        finally:
            child.kill()


def test_own_memory_a_context_and_what_the_driver_does_not_tell_count_as_free(
    folder: LeaseFolder, use_nvml: Callable[[FakeNvml], FakeNvml]
) -> None:
    use_nvml(
        FakeNvml(
            CARDS,
            used={"GPU-aaaa": 70 * 2**30, "GPU-bbbb": 2**30},
            users={"GPU-aaaa": [(os.getpid(), 69 * 2**30)]},
        )
    )
    acquire(folder, Request(2, REAL, "this test"), deadline=30).release()
    use_nvml(FakeNvml(CARDS, init=error("NVMLError_NoPermission", "Insufficient Permissions")))
    acquire(folder, Request(2, REAL, "this test"), deadline=30).release()
