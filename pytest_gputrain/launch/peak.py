"""The most memory that a rank has held. Imports no torch: a rank without it has used no GPU."""

from __future__ import annotations

import sys
from typing import Any


def most_bytes() -> int | None:
    """Of its GPUs, as torch's allocator counts; where it used none, of the host, libraries included.

    None where nobody tells.
    """
    found = of_gpus()
    return of_host() if found is None else found


def of_gpus() -> int | None:
    """Since the rank's begin or ``forget``, of all GPUs together; None where it used none."""
    if (cuda := _used_cuda()) is None:
        return None
    return sum(int(cuda.max_memory_allocated(number)) for number in range(cuda.device_count()))


def of_host() -> int | None:
    """Of the process since it was forked: resident pages, those that it shares with others too."""
    try:
        import resource
    except ImportError:  # Windows
        return None
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024


def forget() -> None:
    """Before a warm rank's next call, which is to be told of its own peak."""
    if (cuda := _used_cuda()) is not None:
        for number in range(cuda.device_count()):
            cuda.reset_peak_memory_stats(number)


def _used_cuda() -> Any:
    torch = sys.modules.get("torch")
    return torch.cuda if torch is not None and torch.cuda.is_initialized() else None
