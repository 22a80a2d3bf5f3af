"""What is needed against what is there, in the words every skip and error of this project uses."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence

from pytest_gputrain.devices.inventory import Gpu, discover
from pytest_gputrain.devices.visible import VARIABLE, named_twice, visible_gpus
from pytest_gputrain.values import format_size, parse_size


def shortage(
    num_gpus: int, memory: str | int | None = None, environ: Mapping[str, str] = os.environ
) -> str | None:
    """Return None when ``num_gpus`` visible GPUs have ``memory`` each, else one line with the numbers.

    Raises ``ValueError`` when ``memory`` is no size or ``GPUTRAIN_FAKE_GPUS`` cannot be read.
    """
    inventory = discover(environ)
    visible = visible_gpus(inventory, environ)
    if memory is None:
        enough = len(visible) >= num_gpus
        return None if enough else f"needs {count(num_gpus)}, found {describe_found(environ)}"
    least = parse_size(memory)
    num_large = sum(gpu.memory_bytes >= least for gpu in visible)
    if num_large >= num_gpus:
        return None
    needed = f"needs {need(num_gpus, memory)}" + (
        f" ({format_size(least)})" if isinstance(memory, str) else ""
    )
    found = describe_found(environ, sizes=True)
    return f"{needed}, found {found}" + (f", {num_large} of them that large" if visible else "")


def need(num_gpus: int, memory: str | int | None) -> str:
    """Return what is asked for, in the words of who asked: ``2 GPUs with 80GB each``."""
    if memory is None:
        return count(num_gpus)
    size = memory if isinstance(memory, str) else format_size(memory)
    return f"{count(num_gpus)} with {size}{' each' * (num_gpus > 1)}"


def count(num_gpus: int) -> str:
    """Return ``1 GPU`` or ``2 GPUs``."""
    return f"{num_gpus} GPU" + "s" * (num_gpus != 1)


def describe_found(environ: Mapping[str, str] = os.environ, *, sizes: bool = False) -> str:
    """Return how many GPUs may be used, of which kind, and who says so: ``1 (NVIDIA H200, by NVML)``."""
    inventory = discover(environ)
    visible = visible_gpus(inventory, environ)
    if not inventory.gpus:
        return f"0 by {inventory.source}" + (f" ({inventory.detail})" if inventory.detail else "")
    parts = [kinds(visible, sizes)] if visible else []
    if (twice := named_twice(inventory, environ)) is not None:
        which = twice.uuid if twice.mig else f"GPU {twice.index}"
        asked = environ.get(VARIABLE, "")
        parts.append(f"{VARIABLE}={asked!r} names {which} twice, so CUDA shows none: name each once")
    elif (num_hidden := len(inventory.gpus) - len(visible)) > 0:
        parts.append(f"{num_hidden} hidden by {VARIABLE}={environ.get(VARIABLE, '')!r}")
    return f"{len(visible)} ({', '.join([*parts, f'by {inventory.source}'])})"


def kinds(gpus: Sequence[Gpu], sizes: bool = False) -> str:
    """Return ``NVIDIA T4, 2 x NVIDIA H200``; with ``sizes``, the memory of each too."""
    names = [f"{gpu.name} {format_size(gpu.memory_bytes)}" if sizes else gpu.name for gpu in gpus]
    numbers = {kind: names.count(kind) for kind in names}
    return ", ".join(kind if number == 1 else f"{number} x {kind}" for kind, number in numbers.items())
