"""Links between GPUs, as NVML tells them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from pytest_gputrain.devices import Gpu, discover
from pytest_gputrain.devices.topology import links

from .conftest import Card, FakeNvml, error

UseNvml = Callable[[FakeNvml], FakeNvml]
HERE = {"PATH": "/nowhere"}


@dataclass
class Linked(FakeNvml):
    """GPUs 0 and 1 by NVLink, 2 on the same NUMA node; of 3 nothing is told."""

    def nvmlDeviceGetP2PStatus(self, one: Card, other: Card, index: int) -> int:
        assert index == 2
        if other.uuid == "GPU-3":
            raise error("NVMLError_NotSupported", "Not Supported")
        return 0 if {one.uuid, other.uuid} == {"GPU-0", "GPU-1"} else 5

    def nvmlDeviceGetTopologyCommonAncestor(self, one: Card, other: Card) -> int:
        if other.uuid == "GPU-3":
            raise error("NVMLError_NotSupported", "Not Supported")
        return 40


def test_links(use_nvml: UseNvml) -> None:
    fake = use_nvml(Linked([Card(f"GPU-{number}") for number in range(4)]))
    assert links(discover(HERE).gpus) == {"NVLink": [(0, 1)], "one NUMA node": [(0, 2), (1, 2)]}
    assert fake.calls == ["init", "shutdown"] * 2


def test_nothing_is_asked_of_what_nvml_did_not_list(use_nvml: UseNvml) -> None:
    fake = use_nvml(Linked([], error("NVMLError_Unknown", "")))
    assert links(discover({"GPUTRAIN_FAKE_GPUS": "4"}).gpus) == {}
    assert links([Gpu(0, "MIG-0", "", 1, True, "NVML"), Gpu(0, "MIG-1", "", 1, True, "NVML")]) == {}
    assert fake.calls == []


def test_a_driver_that_went_away(use_nvml: UseNvml) -> None:
    use_nvml(Linked([Card("GPU-0"), Card("GPU-1")], error("NVMLError_DriverNotLoaded", "")))
    assert links([Gpu(number, f"GPU-{number}", "", 1, False, "NVML") for number in range(2)]) == {}
