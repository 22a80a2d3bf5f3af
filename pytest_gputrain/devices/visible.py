"""Which of the GPUs found CUDA would show to this process: the rules of ``CUDA_VISIBLE_DEVICES``.

Not covered: ``CUDA_DEVICE_ORDER=FASTEST_FIRST`` (CUDA's default) may number *unequal* GPUs otherwise than
NVML does. Counts stay right; which memory size belongs to an index is sure only with ``PCI_BUS_ID``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pytest_gputrain.devices.inventory import Gpu, Inventory

VARIABLE = "CUDA_VISIBLE_DEVICES"


def visible_gpus(inventory: Inventory, environ: Mapping[str, str]) -> tuple[Gpu, ...]:
    """Return the GPUs that CUDA shows, in CUDA's order.

    As in CUDA: an entry that names nothing ends the list (so ``""`` and ``"-1"`` hide all), and an entry
    given twice makes initialisation fail, which leaves none.
    """
    asked = environ.get(VARIABLE)
    if asked is None:
        return inventory.gpus
    chosen = _chosen(inventory, asked)
    return () if _twice(chosen) else chosen


def named_twice(inventory: Inventory, environ: Mapping[str, str]) -> Gpu | None:
    """Return the GPU that ``CUDA_VISIBLE_DEVICES`` gives twice, which is why CUDA shows none at all."""
    return _twice(_chosen(inventory, environ.get(VARIABLE, "")))


def _chosen(inventory: Inventory, asked: str) -> tuple[Gpu, ...]:
    chosen: list[Gpu] = []
    for entry in asked.split(","):
        if (gpu := _named(entry.strip(), inventory.gpus)) is None:
            break
        chosen.append(gpu)
    return tuple(chosen)


def _twice(chosen: tuple[Gpu, ...]) -> Gpu | None:
    return next((gpu for number, gpu in enumerate(chosen) if gpu in chosen[:number]), None)


def _named(entry: str, gpus: tuple[Gpu, ...]) -> Gpu | None:
    if re.fullmatch(r"\+?\d+", entry):
        # A GPU cut by MIG is several entries of one index; by index CUDA opens the first of them.
        return next((gpu for gpu in gpus if gpu.index == int(entry)), None)
    if not entry.startswith(("GPU-", "MIG-")):
        return None
    # CUDA takes any prefix of a UUID that is unambiguous.
    matches = [gpu for gpu in gpus if gpu.uuid.startswith(entry)]
    exact = [gpu for gpu in matches if len(gpu.uuid) == len(entry)]
    if exact:
        return exact[0]
    return matches[0] if len(matches) == 1 else None
