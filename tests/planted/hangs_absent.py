"""A rank that does not come: it has left, is busy, sleeps, or was never asked."""

from __future__ import annotations

import ctypes
import os
import queue
import signal
import sys
import threading
import time

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel as DDP

from tests.planted.hangs import Hang, planted

ABSENT: list[Hang] = []


def rank() -> int:
    return dist.get_rank()


def model() -> nn.Module:
    torch.manual_seed(0)
    return DDP(nn.Linear(16, 8))


@planted(ABSENT, 1, "rank 1 never reached all_reduce #", "136 x float32", "returned from the function",
         "rank 0: 4, rank 1: 3")  # fmt: skip
def uneven_steps_of_ddp() -> int:
    net = model()
    for _ in range(4 - rank()):
        net(torch.ones(2, 16)).sum().backward()  # victim
    return 1  # culprit


@planted(ABSENT, 1, "rank 1 never reached all_reduce #3 (128 x float32)")
def broke_out_of_its_loop() -> int:
    for step in range(5):
        if step == 2 and rank() == 1:
            break
        dist.all_reduce(torch.ones(128))  # victim
    return 1  # culprit


@planted(ABSENT, 2, "rank 2 never reached all_reduce #3 (5 x int64)", world_size=3, slow=True)
def uneven_steps_of_three() -> None:
    for step in range(4):
        if rank() == 2 and step == 2:
            return  # culprit
        dist.all_reduce(torch.ones(5, dtype=torch.int64))  # victim


@planted(ABSENT, 1, "rank 1 never reached barrier #1", "a condition on the rank")
def barrier_on_rank_0_alone() -> None:
    if rank() == 0:
        dist.barrier()  # victim


@planted(ABSENT, 0, "only rank 0 called barrier #2; ranks 1-2 never did", world_size=3)
def save_with_a_barrier_on_rank_0_of_three() -> None:
    def save() -> None:
        dist.barrier()  # culprit

    dist.barrier()
    if rank() == 0:
        save()


@planted(ABSENT, 1, "rank 1 never reached all_reduce #2 (1 x float32)", "only some ranks come to", slow=True)
def evaluation_on_rank_0_alone() -> int:
    dist.all_reduce(torch.ones(4))
    if rank() == 0:
        dist.all_reduce(torch.tensor([0.5]))  # victim
    return 1  # culprit


@planted(ABSENT, 1, "rank 1 never reached all_gather #1", "only some ranks come to", slow=True)
def gathers_objects_on_rank_0_alone() -> None:
    if rank() == 0:
        dist.all_gather_object([None, None], {"loss": 1.0})  # victim


@planted(ABSENT, 1, "rank 1 never reached all_reduce #1 (7 x float32)")
def waits_for_an_asynchronous_collective() -> int:
    if rank() == 0:
        work = dist.all_reduce(torch.ones(7), async_op=True)
        work.wait()  # victim
    return 1  # culprit


@planted(ABSENT, 1, "rank 1 never reached all_reduce #", "136 x float32", slow=True)
def skips_backward() -> int:
    net = model()
    loss = net(torch.ones(2, 16)).sum()
    if rank() == 0:
        loss.backward()  # victim
    return 1  # culprit


@planted(ABSENT, 1, "rank 1 never reached broadcast #3 of group 1 (6 x float32)", world_size=3)
def a_member_of_a_subgroup_leaves() -> None:
    group = dist.new_group([0, 1])
    for _ in range(2):
        dist.broadcast(torch.ones(6), 0, group=group)
    if rank() == 1:
        return  # culprit
    dist.broadcast(torch.ones(6), 0, group=group)  # victim


@planted(ABSENT, 1, "rank 1 never reached new_group", "must be called by every rank")
def new_group_by_rank_0_alone() -> None:
    if rank() == 0:
        dist.new_group([0, 1])  # victim


@planted(ABSENT, 0, "rank 0 never reached all_reduce #1 (3 x float32); it is still in Python", stall=2.0)
def sleeps_on_rank_0() -> None:
    if rank() == 0:
        time.sleep(600)  # culprit
    dist.all_reduce(torch.ones(3))  # victim


@planted(ABSENT, 1, "rank 1 never reached barrier #1; it is still in Python", stall=2.0, slow=True)
def waits_for_a_lock() -> None:
    lock = threading.Lock()
    if rank() == 1:
        lock.acquire()
        lock.acquire()  # culprit
    dist.barrier()  # victim


@planted(ABSENT, 1, "it is still in backward, and waits for no other rank", stall=8.0, slow=True)
def stuck_within_backward() -> None:
    """In C, so that its frames are those of a rank that waits for others; not ended before its stall."""
    net = model()
    loss = net(torch.ones(2, 16)).sum()
    if rank() == 1:
        loss.register_hook(queue.SimpleQueue[None]().get)
        loss.backward()  # culprit
    loss.backward()  # victim


@planted(ABSENT, 1, "rank 1 never reached all_reduce #1 (1 x float32)", stall=2.0, slow=True)
def waits_for_its_data() -> None:
    batches: queue.Queue[float] = queue.Queue()
    if rank() == 0:
        batches.put(1.0)
    batch = batches.get()  # culprit
    dist.all_reduce(torch.tensor([batch]))  # victim


@planted(ABSENT, 1, "rank 1 was still running", "rank 0 waits for it in barrier #1",
         "slow, not hung: rank 1 in", verdict="TIMED_OUT", timeout=4.0)  # fmt: skip
def loops_for_ever() -> None:
    while rank() == 1:
        sum(range(1000))  # culprit
    dist.barrier()  # victim


@planted(ABSENT, 1, "rank 1 never reached all_reduce #2 (2 x float32)", stall=2.0)
def holds_the_interpreter_for_ever() -> None:
    dist.all_reduce(torch.ones(2))
    if rank() == 1:
        mutex = ctypes.create_string_buffer(64)
        ctypes.PyDLL(None).pthread_mutex_lock(mutex)
        ctypes.PyDLL(None).pthread_mutex_lock(mutex)  # culprit
    dist.all_reduce(torch.ones(2))  # victim


@planted(ABSENT, 1, "rank 1 never reached all_reduce #2 (2 x float32)", stall=2.0, slow=True)
def is_stopped() -> None:
    dist.all_reduce(torch.ones(2))
    if rank() == 1:
        os.kill(os.getpid(), signal.SIGSTOP)
    dist.all_reduce(torch.ones(2))  # victim


@planted(ABSENT, 1, "rank 1 never reached all_reduce #1 (2 x float32)", slow=True)
def ignores_sigterm() -> int:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if rank() == 0:
        dist.all_reduce(torch.ones(2))  # victim
    return 1  # culprit


@planted(ABSENT, 1, "rank 1 was still running", verdict="TIMED_OUT", timeout=4.0, slow=True)
def fills_stderr() -> None:
    while rank() == 1:
        sys.stderr.write("x" * 10_000)  # culprit
    dist.barrier()  # victim
