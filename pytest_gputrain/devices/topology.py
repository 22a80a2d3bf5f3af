"""How GPUs are linked to each other, by NVML: no CUDA context is created."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pytest_gputrain.devices.inventory import Gpu

# NVML's numbers, which its Python package has named differently over the years.
_P2P_NVLINK, _P2P_OK = 2, 0
_LEVELS = {
    0: "one board",
    10: "one PCIe switch",
    20: "several PCIe switches",
    30: "one PCIe host bridge",
    40: "one NUMA node",
    50: "across NUMA nodes",
}


def links(gpus: Sequence[Gpu]) -> dict[str, list[tuple[int, int]]]:
    """Return the pairs of whole GPUs by what links them best: ``{"NVLink": [(0, 1)]}``.

    Empty where NVML does not tell, and for GPUs that it did not list.
    """
    whole = [gpu for gpu in gpus if gpu.source == "NVML" and not gpu.mig]
    if len(whole) < 2:
        return {}
    import pynvml

    found: dict[str, list[tuple[int, int]]] = {}
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return {}
    try:
        for one, other in combinations(whole, 2):
            if (link := _link(pynvml, one, other)) is not None:
                found.setdefault(link, []).append((one.index, other.index))
    finally:
        pynvml.nvmlShutdown()
    return found


def _link(pynvml: Any, one: Gpu, other: Gpu) -> str | None:
    try:
        handles = [pynvml.nvmlDeviceGetHandleByIndex(gpu.index) for gpu in (one, other)]
    except pynvml.NVMLError:
        return None
    try:
        if pynvml.nvmlDeviceGetP2PStatus(*handles, _P2P_NVLINK) == _P2P_OK:
            return "NVLink"
    except pynvml.NVMLError:
        pass  # an older driver; the topology may still be told
    try:
        return _LEVELS.get(int(pynvml.nvmlDeviceGetTopologyCommonAncestor(*handles)))
    except pynvml.NVMLError:
        return None
