"""Which of a rank's processes is which worker of a data loader, as the loader itself knows."""

from __future__ import annotations

import gc
from typing import Any


def worker_names() -> dict[int, str]:
    """By process id, of every loader that iterates now. Goes through all of Python's objects."""
    from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter

    found: dict[int, str] = {}
    for one in gc.get_objects():
        if issubclass(type(one), _MultiProcessingDataLoaderIter):
            workers: list[Any] = getattr(one, "_workers", [])
            for number, worker in enumerate(workers):
                if worker.pid is not None:
                    found[worker.pid] = f"data loader worker {number} of {len(workers)}"
    return found
