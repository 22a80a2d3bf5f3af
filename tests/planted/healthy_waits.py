"""Programs that are healthy, though their ranks wait long, differ, or look idle: PASSED, and nothing else."""

from __future__ import annotations

import contextlib
import datetime
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.algorithms.join import Join
from torch.nn.parallel import DistributedDataParallel as DDP
from torch.utils.data import DataLoader, Dataset

WAITS: list[Callable[[], Any]] = []
LONG = 2.5
"""Seconds: three times what a certain hang needs to be called one."""


def healthy(program: Callable[[], Any]) -> Callable[[], Any]:
    WAITS.append(program)
    return program


def rank() -> int:
    return dist.get_rank()


@healthy
def long_validation_on_rank_0_then_a_barrier() -> None:
    if rank() == 0:
        until = time.monotonic() + LONG
        while time.monotonic() < until:
            torch.randn(64, 64).sum()
    dist.barrier()


@healthy
def idle_rank_0_then_a_barrier() -> None:
    if rank() == 0:
        time.sleep(LONG)
    dist.barrier()


@healthy
def uneven_inputs_under_join() -> None:
    net = DDP(nn.Linear(4, 4))
    with Join([net]):
        for _ in range(3 + 2 * rank()):
            net(torch.ones(2, 4)).sum().backward()


@healthy
def slow_python_step() -> None:
    net = DDP(nn.Linear(4, 4))
    for _ in range(2):
        net(torch.ones(2, 4)).sum().backward()
        until = time.monotonic() + LONG / 2
        while time.monotonic() < until and rank() == 1:
            sum(range(1000))


@healthy
def compiles_in_a_child_process() -> None:
    if rank() == 0:  # as inductor's C++ compiler does
        code = f"import time; t = time.monotonic()\nwhile time.monotonic() < t + {LONG}: pass"
        subprocess.run([sys.executable, "-c", code], check=True)
    dist.all_reduce(torch.ones(2))


class Slow(Dataset[int]):
    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> int:
        time.sleep(LONG / 4 if index % 2 else 0)
        return index


@healthy
def slow_data_loader_workers_on_one_rank() -> None:
    workers = 1 if rank() == 0 else 0
    for batch in DataLoader(Slow() if rank() == 0 else list(range(4)), num_workers=workers):  # type: ignore[arg-type]
        dist.all_reduce(batch)


@healthy
def asynchronous_collectives_waited_for_late() -> None:
    works = [dist.all_reduce(torch.ones(1 + n), async_op=True) for n in range(3)]
    if rank() == 1:
        time.sleep(LONG)
    for work in works:
        work.wait()


@healthy
def collectives_of_a_side_thread() -> None:
    group = dist.new_group()

    def checkpoint() -> None:
        time.sleep(LONG if rank() == 1 else 0)
        dist.all_reduce(torch.ones(2), group=group)

    thread = threading.Thread(target=checkpoint)
    thread.start()
    thread.join()
    dist.barrier()


@healthy
def a_subgroup_works_while_the_others_wait() -> None:
    group = dist.new_group([0, 1])
    if rank() < 2:
        for _ in range(3):
            time.sleep(LONG / 3)
            dist.all_reduce(torch.ones(2), group=group)
    dist.barrier()


@healthy
def pipeline_of_messages() -> None:
    x = torch.ones(2)
    for step in range(2):
        if rank() == 0:
            time.sleep(LONG / 2)
            dist.send(x, 1)
        else:
            dist.recv(x, 0)
            assert step >= 0
    dist.monitored_barrier()


@healthy
def each_side_of_a_broadcast_has_its_own_line() -> None:
    for _ in range(2):
        if rank() == 0:
            time.sleep(LONG / 2)
            dist.broadcast_object_list([1], 0)
        else:
            dist.broadcast_object_list([None], 0)


@healthy
def finishes_while_the_other_still_sleeps() -> None:
    dist.all_reduce(torch.ones(2))
    if rank() == 0:
        time.sleep(LONG)


@healthy
def shards_its_parameters() -> None:
    from torch.distributed.fsdp import fully_shard

    net = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    fully_shard(net)
    for _ in range(2):
        time.sleep(LONG / 3 if rank() else 0)
        net(torch.ones(2, 8)).sum().backward()


@healthy
def three_ranks_of_which_one_sends_late() -> None:
    """The last message of rank 0 went to a rank that has returned; it waits for another one."""
    if rank() == 0:
        late, sent = dist.irecv(torch.zeros(4), 2), dist.isend(torch.ones(4), 1)
        for handle in (late, sent):
            assert handle is not None
            handle.wait()
    elif rank() == 1:
        dist.recv(torch.zeros(4), 0)
    else:
        time.sleep(LONG)
        dist.send(torch.ones(4), 0)


@healthy
def three_ranks_and_a_key_after_a_message() -> None:
    store = dist.distributed_c10d._get_default_store()
    if rank() == 0:
        dist.send(torch.ones(4), 1)
        store.wait(["late"])
    elif rank() == 1:
        dist.recv(torch.zeros(4), 0)
    else:
        time.sleep(LONG)
        store.set("late", "")
    with contextlib.suppress(Exception):
        store.wait(["never"], datetime.timedelta(seconds=6 if rank() == 0 else 0.1))
