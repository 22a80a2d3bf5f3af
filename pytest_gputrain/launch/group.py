"""The process group that a function's ranks find ready."""

from __future__ import annotations

import contextlib
import datetime
import os
from collections.abc import Iterator, Mapping
from typing import Any

_BARRIER = "TORCH_DIST_INIT_BARRIER"
"""torch's own switch, off unless somebody sets it: a group is returned on no rank before all have it."""


def join(spec: Mapping[str, Any], rank: int, listen_fd: int | None) -> None:
    """Makes the process group of the ranks."""
    import torch
    import torch.distributed as dist
    from torch.distributed import TCPStore  # type: ignore[attr-defined]

    world_size, device = spec["world_size"], spec["device"]
    if "OMP_NUM_THREADS" in os.environ:
        with contextlib.suppress(ValueError):
            torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    if device == "cuda":
        torch.cuda.set_device(rank % max(1, torch.cuda.device_count()))
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    # The group's own timeout is later than the launch's: the launch names the culprit, the group a victim.
    timeout = datetime.timedelta(seconds=spec.get("group_timeout", spec["timeout"] + 60))
    store = TCPStore(
        host,
        port,
        world_size,
        is_master=rank == 0,
        timeout=timeout,
        wait_for_workers=False,
        master_listen_fd=listen_fd if rank == 0 else None,
    )
    globals()["_store"] = store  # its server must outlive destroy_process_group: a program may join again
    with _on_all_ranks_or_none():
        dist.init_process_group(
            spec["backend"], store=store, rank=rank, world_size=world_size, timeout=timeout
        )


@contextlib.contextmanager
def _on_all_ranks_or_none() -> Iterator[None]:
    """Groups made meanwhile are there on every rank when they are there on one.

    Else a program that destroys its group at once closes gloo's sockets under a rank that still connects,
    which then fails with "Connection closed by peer": 2 to 10 of 100 launches of such a program.
    """
    before = os.environ.get(_BARRIER)
    os.environ[_BARRIER] = before or "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[_BARRIER]
        else:
            os.environ[_BARRIER] = before
