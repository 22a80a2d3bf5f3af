"""Which GPUs this machine has, and how that was found out.

Probes are tried in order and the first that can answer wins; its name is kept as the source. A probe that
cannot answer leaves a note saying why, so that "found 0" is always followed by a reason. None of them
creates a CUDA context in this process: that would cost every test session hundreds of MiB of GPU memory and
would break children that are forked later.

Not covered: AMD and Intel GPUs, Apple's MPS.
"""

from __future__ import annotations

import functools
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

from pytest_gputrain.values import parse_size

FAKE_VARIABLE = "GPUTRAIN_FAKE_GPUS"
# More than any machine has; a slip such as 80000000000 must not build a list of that length.
MAX_FAKE_GPUS = 1024
DEFAULT_FAKE_MEMORY = "80GB"


@dataclass(frozen=True)
class Gpu:
    """One GPU, or one MIG slice of a GPU (then ``index`` is that of the whole GPU).

    ``memory_bytes`` is 0 where the driver does not tell (some GPUs share the host's memory).
    """

    index: int
    uuid: str
    name: str
    memory_bytes: int
    mig: bool
    source: str


class Inventory(NamedTuple):
    """The GPUs found, whatever ``CUDA_VISIBLE_DEVICES`` says; ``detail`` explains when there are none."""

    gpus: tuple[Gpu, ...]
    source: str
    detail: str = ""
    driver: str | None = None


def discover(environ: Mapping[str, str] = os.environ) -> Inventory:
    """Return this machine's GPUs, asking once a process for the same environment.

    Raises ``ValueError`` when ``GPUTRAIN_FAKE_GPUS`` cannot be read.
    """
    return _discover(environ.get(FAKE_VARIABLE, "").strip(), environ.get("PATH"))


@functools.lru_cache(maxsize=32)
def _discover(fake: str, path: str | None) -> Inventory:
    if fake:
        return parse_fake(fake)
    # Imported on demand: this module is loaded with the plugin, the probes only when somebody asks.
    from pytest_gputrain.devices import probes

    notes: list[str] = []
    for probe in (probes.by_nvml, probes.by_nvidia_smi, probes.by_torch):
        if (inventory := probe(notes, path)) is not None:
            return inventory
    return Inventory((), "NVML", "; ".join(notes))


def parse_fake(text: str) -> Inventory:
    """Return the pretended GPUs of ``GPUTRAIN_FAKE_GPUS``: ``"8"`` or ``"8x80GB"``."""
    match = re.fullmatch(r"\s*(\d{1,4})\s*(?:x\s*(\S.*?))?\s*", text)
    if match is None or int(match[1]) > MAX_FAKE_GPUS:
        raise ValueError(_fake_error(text))
    try:
        memory = parse_size(match[2] or DEFAULT_FAKE_MEMORY)
    except ValueError:
        raise ValueError(_fake_error(text)) from None
    gpus = tuple(
        Gpu(index, f"GPU-fa4e0000-0000-0000-0000-{index:012d}", "pretended GPU", memory, False, FAKE_VARIABLE)
        for index in range(int(match[1]))
    )
    return Inventory(gpus, FAKE_VARIABLE, f"{FAKE_VARIABLE}={text}")


def _fake_error(text: str) -> str:
    return (
        f"{FAKE_VARIABLE}={text!r} is not legal: give a number of GPUs from 0 to {MAX_FAKE_GPUS}, "
        f'alone or with their memory, such as "8" or "8x80GB"'
    )
