"""How much memory there is: the host's, or the container's where that has less."""

from __future__ import annotations

from pathlib import Path

import psutil
import pytest

from pytest_gputrain.memory import capacity
from pytest_gputrain.memory.capacity import memory_of

MIB = 2**20


@pytest.fixture
def cgroups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(capacity, "CGROUPS", tmp_path)
    monkeypatch.setattr(capacity, "_OWN_CGROUPS", tmp_path / "cgroup")
    return tmp_path


def write(folder: Path, **files: object) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, value in files.items():
        (folder / name.replace("__", ".")).write_text(f"{value}\n")


def test_the_hosts_memory(cgroups: Path) -> None:
    free, total = memory_of("cpu")
    assert total == psutil.virtual_memory().total
    assert 0 < free <= total


def test_a_container_has_its_limit_less_what_cannot_be_given_back(cgroups: Path) -> None:
    write(cgroups, cgroup="0::/pod/box")
    write(
        cgroups / "pod",
        memory__max=64 * MIB,
        memory__current=40 * MIB,
        memory__stat="anon 1\ninactive_file 0",
    )
    write(
        cgroups / "pod" / "box",
        memory__max=80 * MIB,
        memory__current=40 * MIB,
        memory__stat=f"anon 1\ninactive_file {8 * MIB}",
    )
    assert memory_of("cpu") == (24 * MIB, 64 * MIB)


def test_a_container_without_limit(cgroups: Path) -> None:
    write(cgroups, cgroup="0::/", memory__max="max", memory__current=40 * MIB)
    assert memory_of("cpu")[1] == psutil.virtual_memory().total


def test_cgroups_of_version_1_seen_from_inside(cgroups: Path) -> None:
    write(cgroups, cgroup="5:cpu:/docker/1\n4:memory:/docker/1")
    write(
        cgroups / "memory",
        memory__limit_in_bytes=64 * MIB,
        memory__usage_in_bytes=40 * MIB,
        memory__stat=f"total_inactive_file {16 * MIB}",
    )
    assert memory_of("cpu") == (40 * MIB, 64 * MIB)


def test_a_device_that_is_not_there() -> None:
    with pytest.raises(ValueError, match=r"^device 'cuda:99' is not there: torch sees \d+ CUDA devices; "):
        memory_of("cuda:99")
