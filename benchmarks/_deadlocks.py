"""Programs of two ranks that hang for certain, each of which writes down when it came to where it hangs.

Run as a script by torchrun (``_deadlocks.py NAME FOLDER TIMEOUT``), as functions by the others.
"""

from __future__ import annotations

import datetime
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist

Mark = Callable[[], None]


def returns_early(rank: int, mark: Mark) -> None:
    dist.all_reduce(torch.ones(8))
    mark()
    if rank == 0:
        dist.all_reduce(torch.ones(8))


def barrier_on_rank_0(rank: int, mark: Mark) -> None:
    mark()
    if rank == 0:
        dist.barrier()


def gathers_objects_on_rank_0(rank: int, mark: Mark) -> None:
    mark()
    if rank == 0:
        dist.all_gather_object([None, None], "loss")


def other_order(rank: int, mark: Mark) -> None:
    x = torch.ones(3)
    mark()
    for step in (rank, 1 - rank):
        dist.broadcast(x, 0) if step else dist.all_reduce(x)


def two_groups(rank: int, mark: Mark) -> None:
    groups = [dist.new_group([0, 1]), dist.new_group([0, 1])]
    mark()
    for number in (rank, 1 - rank):
        dist.all_reduce(torch.ones(2), group=groups[number])


def both_receive(rank: int, mark: Mark) -> None:
    mark()
    dist.recv(torch.ones(1), 1 - rank)
    dist.send(torch.ones(1), 1 - rank)


def fewer_steps_of_ddp(rank: int, mark: Mark) -> None:
    net = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(16, 8))
    for _ in range(2):
        net(torch.ones(2, 16)).sum().backward()
    mark()
    if rank == 0:
        net(torch.ones(2, 16)).sum().backward()


def asynchronous(rank: int, mark: Mark) -> None:
    mark()
    if rank == 0:
        work = dist.all_reduce(torch.ones(2), async_op=True)
        assert work is not None
        work.wait()


PROGRAMS: dict[str, Callable[[int, Mark], None]] = {
    program.__name__: program
    for program in (returns_early, barrier_on_rank_0, gathers_objects_on_rank_0, other_order, two_groups,
                    both_receive, fewer_steps_of_ddp, asynchronous)
}  # fmt: skip


def run(name: str, folder: str) -> None:
    """A rank's part; the process group is ready."""
    rank = dist.get_rank()
    PROGRAMS[name](rank, lambda: _mark(Path(folder) / str(rank)))
    if dist.get_backend() and "TORCHELASTIC_RUN_ID" in os.environ:
        time.sleep(600)  # else the rank that is done would take its connections with it: no hang


def _mark(path: Path) -> None:
    path.with_suffix(".part").write_text(repr(time.time()))
    path.with_suffix(".part").rename(path)


def certain_since(folder: Path) -> float:
    """When the last rank came to where the program hangs."""
    return max(float((folder / str(rank)).read_text()) for rank in range(2))


if __name__ == "__main__":
    dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=float(sys.argv[3])))
    run(sys.argv[1], sys.argv[2])
