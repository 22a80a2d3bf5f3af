"""``--share-gpu``: more ranks than GPUs, and how that is called wherever a result of it is shown.

NCCL refuses two ranks on one GPU, so these ranks talk through gloo. What they compute is right; how fast, and
with how much memory, says nothing about a machine with a GPU for each.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from pytest_gputrain.devices.inventory import FAKE_VARIABLE, discover
from pytest_gputrain.devices.shortage import count, kinds, shortage
from pytest_gputrain.devices.visible import visible_gpus
from pytest_gputrain.values import parse_size

if TYPE_CHECKING:
    from pytest_gputrain.devices.inventory import Gpu

WAY_OUT = "--share-gpu lets ranks share {} through gloo"


def gpus_to_share(
    num_ranks: int, memory: str | int | None = None, environ: Mapping[str, str] = os.environ
) -> tuple[Gpu, ...]:
    """Return the visible GPUs that ``num_ranks`` ranks could share; empty where they cannot, or need not.

    ``memory`` is what each rank needs: a GPU must have it for all of its ranks together.
    """
    visible = visible_gpus(discover(environ), environ)
    if not visible or len(visible) >= num_ranks:
        return ()
    most_ranks = -(-num_ranks // len(visible))
    least = 0 if memory is None else parse_size(memory) * most_ranks
    return visible if all(gpu.memory_bytes >= least for gpu in visible) else ()


def lacking(
    num_ranks: int,
    memory: str | int | None = None,
    environ: Mapping[str, str] = os.environ,
    *,
    share_gpu: bool,
) -> str | None:
    """Return None where so many ranks can run, else ``needs 2 GPUs, found …`` with the way out, if any."""
    lack = shortage(num_ranks, memory, environ)
    if lack is None:
        return None
    gpus = gpus_to_share(num_ranks, memory, environ)
    if not gpus:
        return lack
    if not share_gpu and environ.get(FAKE_VARIABLE):  # no way out: nothing can run on them
        return lack
    return None if share_gpu else f"{lack}; {WAY_OUT.format('it' if len(gpus) == 1 else 'them')}"


def label(num_ranks: int, gpus: Sequence[Gpu]) -> str:
    """Return what every result of such ranks carries: ``2 ranks shared 1 GPU (NVIDIA H200) …``."""
    return f"{num_ranks} ranks shared {count(len(gpus))} ({kinds(gpus)}) through gloo: not a multi-GPU result"
