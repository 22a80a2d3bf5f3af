"""The ways to find out which GPUs there are. Each returns an inventory, or None and a note saying why not."""

from __future__ import annotations

import csv
import ctypes
import json
import os
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from pytest_gputrain.devices.inventory import Gpu, Inventory

# A healthy nvidia-smi answers in about a second, on a machine with eight GPUs and persistence off in ten.
NVIDIA_SMI_TIMEOUT = 20.0
# Importing torch with CUDA from a cold network file system has been seen to take half a minute.
TORCH_TIMEOUT = 90.0
# Without one of these the kernel has no NVIDIA driver (the last is WSL's), and importing torch, which costs
# seconds, could only say so again.
DEVICE_NODES = ("/dev/nvidiactl", "/dev/nvidia0", "/dev/dxg")

NVML_LIBRARY = "libnvidia-ml.so.1"  # the name pynvml opens, and the only one

# What NVML's errors mean to somebody who wanted to run a test; any other is shown in NVML's own words.
NVML_REASONS = {
    "NVMLError_LibraryNotFound": "no NVIDIA driver: the NVML library is not there",
    "NVMLError_DriverNotLoaded": "the NVIDIA driver is installed but not loaded",
    "NVMLError_LibRmVersionMismatch": "driver and NVML library are of different versions; reload the driver",
    "NVMLError_NoPermission": "no permission to talk to the NVIDIA driver",
}


def by_nvml(notes: list[str], path: str | None = None) -> Inventory | None:
    """Ask the driver's management library: exact, quick, and it knows MIG."""
    if "pynvml" not in sys.modules and not _nvml_library_loads():
        notes.append(NVML_REASONS["NVMLError_LibraryNotFound"])
        return None
    try:
        import pynvml
    except ImportError:
        notes.append("nvidia-ml-py is not installed")
        return None
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as error:
        notes.append(_nvml_reason(error))
        return None
    try:
        driver = _text(pynvml.nvmlSystemGetDriverVersion())
        count = int(pynvml.nvmlDeviceGetCount())
        gpus = tuple(gpu for index in range(count) for gpu in _nvml_gpus(pynvml, index))
    except pynvml.NVMLError as error:
        notes.append(_nvml_reason(error))
        return None
    finally:
        pynvml.nvmlShutdown()
    return Inventory(gpus, "NVML", "" if gpus else f"driver {driver} is loaded but shows no GPU", driver)


def _nvml_library_loads() -> bool:
    """Whether there is a driver to ask, which most laptops and CI machines lack.

    pynvml takes 10 to 20 ms to import, in every pytest session, to find out the same on the first call.
    """
    if sys.platform != "linux":
        return True  # pynvml knows where the library is elsewhere
    try:
        ctypes.CDLL(NVML_LIBRARY)
    except OSError:
        return False
    return True


def _nvml_gpus(pynvml: Any, index: int) -> list[Gpu]:
    """Return the GPU of that index, or its slices when MIG is on: then the whole cannot be opened."""
    whole = pynvml.nvmlDeviceGetHandleByIndex(index)
    handles = _mig_handles(pynvml, whole)
    mig = handles is not None
    return [
        Gpu(
            index=index,
            uuid=_text(pynvml.nvmlDeviceGetUUID(handle)),
            name=_text(pynvml.nvmlDeviceGetName(handle)),
            memory_bytes=_nvml_memory(pynvml, handle),
            mig=mig,
            source="NVML",
        )
        for handle in ([whole] if handles is None else handles)
    ]


def _mig_handles(pynvml: Any, whole: Any) -> list[Any] | None:
    try:
        if pynvml.nvmlDeviceGetMigMode(whole)[0] != pynvml.NVML_DEVICE_MIG_ENABLE:
            return None
        slots = range(pynvml.nvmlDeviceGetMaxMigDeviceCount(whole))
    except pynvml.NVMLError:
        return None  # this GPU, or this driver, does not know MIG
    handles = []
    for slot in slots:
        try:
            handles.append(pynvml.nvmlDeviceGetMigDeviceHandleByIndex(whole, slot))
        except pynvml.NVMLError:
            continue  # an empty slot
    return handles


def _nvml_memory(pynvml: Any, handle: Any) -> int:
    try:
        return int(pynvml.nvmlDeviceGetMemoryInfo(handle).total)
    except pynvml.NVMLError:
        return 0  # GPUs that share the host's memory do not tell


def _nvml_reason(error: Exception) -> str:
    return NVML_REASONS.get(type(error).__name__, str(error))


def _text(value: str | bytes) -> str:
    return value.decode() if isinstance(value, bytes) else value  # bytes in older nvidia-ml-py


def by_nvidia_smi(notes: list[str], path: str | None = None) -> Inventory | None:
    """Ask the driver's command line tool. It lists whole GPUs: slices of MIG stay unknown this way."""
    tool = shutil.which("nvidia-smi", path=path)
    if tool is None:
        return None
    query = "--query-gpu=index,uuid,name,memory.total,driver_version"
    try:
        done = subprocess.run(
            [tool, query, "--format=csv,noheader,nounits"],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=NVIDIA_SMI_TIMEOUT,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        notes.append(f"nvidia-smi did not answer: {error}")
        return None
    if done.returncode != 0:
        said = (done.stdout + done.stderr).strip().splitlines() or ["nothing said"]
        notes.append(f"nvidia-smi exited with {done.returncode}: {said[0]}")
        return None
    try:
        rows = [_smi_row(row) for row in csv.reader(done.stdout.splitlines(), skipinitialspace=True) if row]
    except (ValueError, IndexError):
        notes.append(f"nvidia-smi gave an answer that cannot be read: {done.stdout.strip()[:100]!r}")
        return None
    driver = rows[0][1] if rows else None
    return Inventory(tuple(gpu for gpu, _ in rows), "nvidia-smi", "" if rows else "it lists no GPU", driver)


def _smi_row(row: list[str]) -> tuple[Gpu, str]:
    index, uuid, name, mebibytes, driver = row[:5]
    memory = int(mebibytes) * 2**20 if mebibytes.isdigit() else 0  # "[N/A]" where memory is the host's
    return Gpu(int(index), uuid, name, memory, False, "nvidia-smi"), driver


TORCH_SCRIPT = """
import json, torch
found = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
print(json.dumps([[str(getattr(p, "uuid", "")), p.name, p.total_memory] for p in found]))
"""


def by_torch(notes: list[str], path: str | None = None) -> Inventory | None:
    """Ask torch, in a child process so that its CUDA context ends with it."""
    if not any(Path(node).exists() for node in DEVICE_NODES) or find_spec("torch") is None:
        return None
    environ = {key: value for key, value in os.environ.items() if key != "CUDA_VISIBLE_DEVICES"}
    try:
        done = subprocess.run(
            [sys.executable, "-c", TORCH_SCRIPT],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=TORCH_TIMEOUT,
            env=environ,
            check=True,
        )
        rows = json.loads(done.stdout)
    except (OSError, subprocess.SubprocessError, ValueError) as error:
        notes.append(f"torch in a child process did not answer: {error}")
        return None
    source = "torch in a child process"
    gpus = tuple(
        Gpu(index, uuid if uuid.startswith("GPU-") else f"GPU-{uuid}", name, memory, False, source)
        for index, (uuid, name, memory) in enumerate(rows)
    )
    return Inventory(gpus, source, "" if gpus else "it sees no CUDA device")
