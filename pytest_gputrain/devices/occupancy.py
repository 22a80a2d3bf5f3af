"""Whether a GPU that nobody leases is in use all the same, and by whom.

Leases bind those who ask for them; a notebook, a training run or a process that a crashed test left does not.

Not covered: GPUs found without NVML (by nvidia-smi or torch), and pretended ones: these count as free.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from pytest_gputrain.values import format_size

if TYPE_CHECKING:
    from pytest_gputrain.devices.inventory import Gpu

# What is in use by others on a GPU that counts as free. A CUDA context alone takes 0.3 to 0.6 GiB, the driver
# some more, and each xdist worker that has used CUDA in its own process keeps a context until it ends.
FREE_BYTES = 1 << 30
FREE_SHARE = 0.05


def in_use(gpus: Sequence[Gpu]) -> dict[str, str]:
    """Return, by UUID, the GPUs whose memory is not free: who uses how much of it, a line each.

    What this process and its children (warm ranks) hold does not count. An answer that NVML cannot give
    counts as free: the lease is then all there is.
    """
    asked = [gpu for gpu in gpus if gpu.source == "NVML"]
    if not asked:
        return {}
    import pynvml

    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return {}
    try:
        found = {gpu.uuid: _line(pynvml, gpu) for gpu in asked}
    finally:
        pynvml.nvmlShutdown()
    return {uuid: line for uuid, line in found.items() if line is not None}


def _line(pynvml: Any, gpu: Gpu) -> str | None:
    try:
        handle = pynvml.nvmlDeviceGetHandleByUUID(gpu.uuid)
        memory = pynvml.nvmlDeviceGetMemoryInfo(handle)
        users = _users(pynvml, handle)
    except pynvml.NVMLError:
        return None
    total = int(memory.total)
    used = int(memory.used) - sum(users.pop(pid, 0) for pid in _own(users))
    if used <= max(FREE_BYTES, FREE_SHARE * total):
        return None
    by = ", ".join(_described(pid, size) for pid, size in users.items()) or "unseen processes"
    return f"GPU {gpu.index} ({gpu.uuid}): {format_size(used)} of {format_size(total)} in use by {by}"


def _own(users: Mapping[int, int]) -> list[int]:
    """Which of the users are this process or below it."""
    import psutil

    mine = [os.getpid()]
    if users.keys() - mine:
        with contextlib.suppress(psutil.Error):
            mine += [child.pid for child in psutil.Process().children(recursive=True)]
    return mine


def _users(pynvml: Any, handle: Any) -> dict[int, int]:
    """Bytes by process; 0 where the driver does not tell. In a container processes outside it are unseen."""
    found: dict[int, int] = {}
    for query in ("nvmlDeviceGetComputeRunningProcesses", "nvmlDeviceGetGraphicsRunningProcesses"):
        try:
            for process in getattr(pynvml, query)(handle):
                found[process.pid] = max(found.get(process.pid, 0), int(process.usedGpuMemory or 0))
        except pynvml.NVMLError:
            continue
    return found


def _described(pid: int, size: int) -> str:
    import psutil

    amount = f" {format_size(size)}" if size else ""
    try:
        process = psutil.Process(pid)
        return f"pid {pid} ({process.username()}: {' '.join(process.cmdline())[:80]}){amount}"
    except psutil.Error:
        return f"pid {pid}{amount}"
