"""How much memory a device has, and how much of it this process can still get."""

from __future__ import annotations

import platform
from collections.abc import Iterator
from pathlib import Path

import torch

CGROUPS = Path("/sys/fs/cgroup")
_OWN_CGROUPS = Path("/proc/self/cgroup")
_MEMINFO = Path("/proc/meminfo")


def memory_of(device: str | torch.device = "cpu") -> tuple[int, int]:
    """Return (free bytes, total bytes) of a device, as this process can have them.

    On the CPU: of the host, or of the container (cgroup) where that has less. On CUDA, what torch's
    allocator holds unused counts as free; asking makes a CUDA context. Raises ``ValueError`` for a device
    that is not there.
    """
    device = known_device(device)
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        idle = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return free + idle, total
    free, total = _host()
    for used, limit in _cgroups():
        free, total = min(free, max(limit - used, 0)), min(total, limit)
    return free, total


def pool_of(device: str | torch.device) -> str:
    """Which memory it is: the same text for every process that takes from it. Raises as `memory_of` does."""
    device = known_device(device)
    if device.type == "cuda":
        return f"GPU {torch.cuda.get_device_properties(device).uuid}"
    return f"memory of {platform.node()}"


def known_device(device: str | torch.device) -> torch.device:
    """Return the device, a CUDA device with its index. Raises ``ValueError`` when it is not there."""
    try:
        device = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"{device!r} is not a device; give 'cpu', 'cuda' or 'cuda:0'") from error
    if device.type == "cpu":
        return torch.device("cpu")
    if device.type != "cuda":
        raise ValueError(
            f"memory of device {str(device)!r} is not known here; give 'cpu', 'cuda' or 'cuda:0'"
        )
    num_devices = torch.cuda.device_count()
    if (device.index or 0) >= num_devices:
        raise ValueError(
            f"device {str(device)!r} is not there: torch sees {num_devices} CUDA devices; 'cpu' always works"
        )
    if device.index is None:
        return torch.device("cuda", torch.cuda.current_device())
    return device


def _host() -> tuple[int, int]:
    """(available, total) of the host."""
    try:
        lines = dict(line.split(":", 1) for line in _MEMINFO.read_text().splitlines())
        return int(lines["MemAvailable"].split()[0]) << 10, int(lines["MemTotal"].split()[0]) << 10
    except (OSError, ValueError, KeyError):
        import psutil  # on demand: it takes 20 ms, a good part of an answer from the cache

        host = psutil.virtual_memory()
        return host.available, host.total


def _cgroups() -> Iterator[tuple[int, int]]:
    """(used, limit) of each memory cgroup with a limit around this process."""
    try:
        entries = [line.split(":", 2) for line in _OWN_CGROUPS.read_text().splitlines()]
    except OSError:
        return
    for _, controllers, path in entries:
        if controllers == "":
            yield from _limits(CGROUPS, path, "memory.max", "memory.current", "inactive_file")
        elif "memory" in controllers.split(","):
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
            yield from _limits(CGROUPS / "memory", path, *names)


def _limits(root: Path, path: str, limit: str, usage: str, cache: str) -> Iterator[tuple[int, int]]:
    # In a container the path is the host's, and its files lie at the root of what is mounted.
    folder = root / path.lstrip("/")
    for place in [folder, *folder.parents]:
        if place.is_relative_to(root) and (found := _read(place / limit)) is not None:
            used = (_read(place / usage) or 0) - (_read_stat(place / "memory.stat", cache) or 0)
            yield max(used, 0), found


def _read(path: Path) -> int | None:
    try:
        return int(path.read_text())
    except (OSError, ValueError):  # "max"
        return None


def _read_stat(path: Path, name: str) -> int | None:
    try:
        pairs = dict(line.split() for line in path.read_text().splitlines())
        return int(pairs[name])
    except (OSError, ValueError, KeyError):
        return None
