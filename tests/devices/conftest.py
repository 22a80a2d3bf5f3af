"""A pretended NVML, so that what a driver may answer can be tried without one."""

from __future__ import annotations

import sys
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest

from pytest_gputrain.devices import inventory


class NVMLError(Exception):
    """The real one is the base of one class an error code, named as below."""


def error(name: str, text: str) -> NVMLError:
    made: NVMLError = type(name, (NVMLError,), {})(text)
    return made


@dataclass
class Card:
    """One handle: a GPU, or a slice of one."""

    uuid: str
    name: str = "NVIDIA H200"
    memory: int | None = 143771 * 2**20
    slices: list[Card | None] | None = None


@dataclass
class FakeNvml:
    """What ``pynvml`` answers; an exception in ``init`` is raised by ``nvmlInit``."""

    cards: list[Card]
    init: Exception | None = None
    calls: list[str] = field(default_factory=list)
    used: dict[str, int] = field(default_factory=dict)
    users: dict[str, list[tuple[int, int]]] = field(default_factory=dict)

    def module(self) -> types.ModuleType:
        module: Any = types.ModuleType("pynvml")
        module.NVMLError = NVMLError
        module.NVML_DEVICE_MIG_ENABLE = 1
        for name in (name for name in dir(self) if name.startswith("nvml")):
            setattr(module, name, getattr(self, name))
        result: types.ModuleType = module
        return result

    def nvmlInit(self) -> None:
        if self.init is not None:
            raise self.init
        self.calls.append("init")

    def nvmlShutdown(self) -> None:
        self.calls.append("shutdown")

    def nvmlSystemGetDriverVersion(self) -> bytes:
        return b"580.95.05"

    def nvmlDeviceGetCount(self) -> int:
        return len(self.cards)

    def nvmlDeviceGetHandleByIndex(self, index: int) -> Card:
        return self.cards[index]

    def nvmlDeviceGetUUID(self, card: Card) -> str:
        return card.uuid

    def nvmlDeviceGetName(self, card: Card) -> bytes:
        return card.name.encode()

    def nvmlDeviceGetMemoryInfo(self, card: Card) -> Any:
        if card.memory is None:
            raise error("NVMLError_NotSupported", "Not Supported")
        return types.SimpleNamespace(total=card.memory, used=self.used.get(card.uuid, 0))

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> Card:
        return next(card for card in self.cards if card.uuid == uuid)

    def nvmlDeviceGetComputeRunningProcesses(self, card: Card) -> list[Any]:
        users = self.users.get(card.uuid, [])
        return [types.SimpleNamespace(pid=pid, usedGpuMemory=size) for pid, size in users]

    def nvmlDeviceGetGraphicsRunningProcesses(self, card: Card) -> list[Any]:
        raise error("NVMLError_NotSupported", "Not Supported")

    def nvmlDeviceGetMigMode(self, card: Card) -> list[int]:
        if card.slices is None:
            raise error("NVMLError_NotSupported", "Not Supported")
        return [1, 1]

    def nvmlDeviceGetMaxMigDeviceCount(self, card: Card) -> int:
        return len(card.slices or [])

    def nvmlDeviceGetMigDeviceHandleByIndex(self, card: Card, slot: int) -> Card:
        found = (card.slices or [])[slot]
        if found is None:
            raise error("NVMLError_NotFound", "Not Found")
        return found


@pytest.fixture
def use_nvml(monkeypatch: pytest.MonkeyPatch) -> Callable[[FakeNvml], FakeNvml]:
    def use(fake: FakeNvml) -> FakeNvml:
        monkeypatch.setitem(sys.modules, "pynvml", fake.module())
        return fake

    return use


@pytest.fixture(autouse=True)
def _ask_anew(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Nothing of the caller's settings, and no answer kept from or for another test."""
    for name in ("GPUTRAIN_FAKE_GPUS", "CUDA_VISIBLE_DEVICES"):
        monkeypatch.delenv(name, raising=False)
    inventory._discover.cache_clear()
    yield
    inventory._discover.cache_clear()
