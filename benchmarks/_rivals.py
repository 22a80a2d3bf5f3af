"""How others start the ranks of a test, each in its own manner, doing nothing but one ``all_reduce``.

Rank functions are at module level, because ``spawn`` and ``forkserver`` import them by name. Like a test
module of theirs, this one imports torch at the top, so every new interpreter pays for torch and no more.
"""

from __future__ import annotations

import os
import signal
import socket
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

WORLD_SIZE = 2
TIMEOUT = 120.0
_POLL = 0.1  # how often DeepSpeed's harness and PyTorch's look whether processes have ended


def all_reduce_once() -> float:
    """The work of a rank; the process group is ready. Returns the number of ranks."""
    tensor = torch.ones(1)
    dist.all_reduce(tensor)
    assert tensor.item() == WORLD_SIZE
    return tensor.item()


def is_killed() -> float:
    """The work of ranks of which the second is killed."""
    if dist.get_rank() == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    return all_reduce_once()


def spawn_processes(work: Callable[[], float] = all_reduce_once) -> None:
    """N spawned processes that meet by environment variables: DeepSpeed's ``non_daemonic_procs``."""
    context = mp.get_context("spawn")
    port = _free_port()
    processes = [
        context.Process(target=_rank_by_environment, args=(n, port, work)) for n in range(WORLD_SIZE)
    ]
    deadline = time.monotonic() + TIMEOUT
    try:
        for process in processes:
            process.start()
        while all(process.is_alive() for process in processes) and time.monotonic() < deadline:
            time.sleep(_POLL)
        for process in processes:
            process.join(max(0.0, deadline - time.monotonic()))
        assert [process.exitcode for process in processes] == [0] * WORLD_SIZE
    finally:
        for process in processes:
            if process.is_alive():
                process.kill()


def _rank_by_environment(rank: int, port: int, work: Callable[[], float]) -> None:
    environment = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": WORLD_SIZE, "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in environment.items()}, MASTER_ADDR="127.0.0.1")
    dist.init_process_group("gloo", init_method="env://")
    dist.barrier()
    work()
    dist.destroy_process_group()


def _free_port() -> int:
    """A port that was free a moment ago: the manner of the original, wrong in principle."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port: int = sock.getsockname()[1]
        return port


def forkserver_pool() -> None:
    """A new pool of N processes that meet by a file, ended after the test: DeepSpeed's default.

    The half second that DeepSpeed sleeps after each launch is left out.
    """
    context: Any = mp.get_context("forkserver")
    with tempfile.TemporaryDirectory() as folder, context.Pool(WORLD_SIZE) as pool:
        store = f"file://{Path(folder) / 'store'}"
        done = pool.starmap_async(_rank_by_file, [(rank, store) for rank in range(WORLD_SIZE)])
        assert done.get(TIMEOUT) == [WORLD_SIZE] * WORLD_SIZE
        pool.starmap_async(_leave, [()] * WORLD_SIZE).get(TIMEOUT)
        pool.close()
        pool.join()


def _rank_by_file(rank: int, store: str) -> float:
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=WORLD_SIZE)
    dist.barrier()
    return all_reduce_once()


def _leave() -> None:
    if dist.is_initialized():  # a process may get no call of this, or two
        dist.destroy_process_group()
