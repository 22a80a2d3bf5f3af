"""The machine that a session runs on, as its report names it: hardware, versions, the user's commit.

Asks NVML for GPUs and the metadata of packages for versions: no torch is imported and no CUDA context made.
"""

from __future__ import annotations

import os
import platform
from pathlib import Path

from pytest_gputrain.devices.inventory import FAKE_VARIABLE, discover
from pytest_gputrain.devices.shortage import kinds
from pytest_gputrain.devices.visible import visible_gpus
from pytest_gputrain.origin import origin
from pytest_gputrain.report.model import Gpu, Machine

_CHANGED = "+changes"


def this_machine(repository: Path) -> Machine:
    """This machine, with what is checked out in ``repository``. Takes some 20 ms, most of them git's."""
    import psutil

    facts = origin(repository)
    inventory = discover()
    gpus = visible_gpus(inventory, os.environ)
    commit = facts["commit"]
    told = None if commit is None else str(commit)
    cpu, cores = str(facts["cpu"]), int(facts["cpu_cores"] or 1)
    torch = None if facts["torch"] is None else str(facts["torch"])
    pretended = inventory.source == FAKE_VARIABLE
    hardware = kinds(gpus) if gpus else f"{cpu} ({cores} cores), no GPU"
    return Machine(
        host=platform.node(),
        os=str(facts["system"]),
        python=str(facts["python"]),
        torch=torch,
        pytest_gputrain=None if facts["pytest_gputrain"] is None else str(facts["pytest_gputrain"]),
        cpu=cpu,
        cores=cores,
        memory_bytes=psutil.virtual_memory().total,
        gpus=tuple(Gpu(gpu.name, gpu.memory_bytes) for gpu in gpus),
        gpu_origin=f"pretended ({inventory.detail})" if pretended else inventory.source if gpus else "none",
        label=f"{hardware} · torch {torch or 'not installed'} · {_at(told)}",
        commit=None if told is None else told.removesuffix(_CHANGED),
        dirty=None if told is None else told.endswith(_CHANGED),
    )


def _at(commit: str | None) -> str:
    return f"commit {commit}" if commit else "outside of a git repository"
