"""Ranks that come to different things, to the same in another order, or that die."""

from __future__ import annotations

import ctypes
import os
import signal
import threading

import torch
import torch.distributed as dist

from tests.planted.hangs import EITHER, Hang, planted
from tests.planted.hangs_absent import model, rank

DESYNC: list[Hang] = []


@planted(DESYNC, None, "called broadcast #2 (3 x float32)", "called all_reduce #2 (3 x float32)",
         "in a different order")  # fmt: skip
def different_order() -> None:
    x, group = torch.ones(3), dist.new_group()
    dist.barrier()
    if rank() == 0:
        dist.all_reduce(x)  # victim
        dist.broadcast(x, 0)
    else:
        dist.broadcast(x, 0)  # culprit
        dist.all_reduce(x)
    dist.barrier(group=group)


@planted(DESYNC, 2, "rank 2 called broadcast #1 (3 x float32)", "ranks 0-1, 3 called all_reduce #1",
         world_size=4)  # fmt: skip
def different_order_on_one_of_four() -> None:
    x = torch.ones(3)
    if rank() == 2:
        dist.broadcast(x, 0)  # culprit
        dist.all_reduce(x)
    dist.all_reduce(x)  # victim
    dist.broadcast(x, 0)


@planted(DESYNC, None, "all_reduce #1 (8 x float32)", "all_gather #1 (8 x float32)", slow=True)
def different_operations() -> None:
    x = torch.ones(8)
    if rank() == 0:
        dist.all_reduce(x)  # culprit
    else:
        dist.all_gather([torch.ones(8), torch.ones(8)], x)  # culprit
    dist.barrier()


@planted(DESYNC, 1, "it called all_reduce #3 with 64 x float32 where rank 0 had 128 x float32",
         verdict="CRASHED")  # fmt: skip
def different_sizes() -> None:
    for _ in range(2):
        dist.all_reduce(torch.ones(4))
    dist.all_reduce(torch.ones(64 if rank() else 128))  # culprit


@planted(DESYNC, EITHER, "all_reduce #1 with 8 x float", "had 8 x float", verdict="CRASHED")
def different_dtypes() -> None:
    kind = torch.float64 if rank() else torch.float32
    dist.all_reduce(torch.ones(8, dtype=kind))  # culprit


@planted(DESYNC, None, "all_reduce #5 (1 x float32)", "broadcast #5", "look for a condition")
def conditional_collective_meets_a_bucket() -> None:
    net = model()
    for _ in range(3):
        loss = net(torch.ones(2, 16)).sum()
        loss.backward()
        if rank() == 0:
            dist.all_reduce(loss.detach())  # culprit


@planted(
    DESYNC, None, "ranks wait for each other", "of group 1", "of group 2", "two groups in opposite order"
)
def two_groups_in_opposite_order() -> None:
    first, second = dist.new_group([0, 1]), dist.new_group([0, 1])
    groups = [first, second] if rank() == 0 else [second, first]
    for group in groups:
        dist.all_reduce(torch.ones(2), group=group)  # victim


@planted(DESYNC, None, "ranks wait for each other", "recv")
def both_receive_first() -> None:
    x = torch.ones(1)
    dist.recv(x, 1 - rank())  # victim
    dist.send(x, 1 - rank())


@planted(DESYNC, 1, "rank 1 never answered recv (1 to 0) of rank 0; it returned from the function")
def receives_from_a_rank_that_has_left() -> int:
    if rank() == 0:
        dist.recv(torch.ones(1), 1)  # victim
    return 1  # culprit


@planted(DESYNC, None, "barrier #1", "broadcast #1", slow=True)
def objects_against_a_barrier() -> None:
    if rank() == 0:
        dist.broadcast_object_list(["a"], 0)  # culprit
    dist.barrier()  # victim


@planted(DESYNC, 1, "rank 1 raised ValueError: boom", verdict="FAILED")
def raises() -> None:
    if rank() == 1:
        raise ValueError("boom")  # culprit
    dist.all_reduce(torch.ones(3))  # victim


@planted(DESYNC, None, "called barrier #1", "rank 1 is handling RuntimeError: no shard of this rank (",
         "rank 1 came there by an exception")  # fmt: skip
def waits_in_a_finally() -> None:
    try:
        if rank() == 1:
            raise RuntimeError("no shard of this rank")
        dist.all_reduce(torch.ones(3))  # victim
    finally:
        dist.barrier()  # culprit


@planted(DESYNC, 0, "it called all_reduce #9 with 1 x float32 where rank 1 had 40 x float32 [",
         "only some ranks come to", verdict="CRASHED", slow=True)  # fmt: skip
def announces_its_own_best_loss() -> None:
    net = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(4, 8))
    for step in range(4):
        loss = net(torch.ones(2, 4)).sum()
        loss.backward()  # victim
        if step == 2 and rank() == 0:
            dist.all_reduce(loss.detach().reshape(1))  # culprit


@planted(
    DESYNC, 1, "rank 1 was killed by SIGKILL", "all_reduce #1 (3 x float32)", verdict="CRASHED", slow=True
)
def is_killed() -> None:
    if rank() == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    dist.all_reduce(torch.ones(3))  # victim


@planted(DESYNC, 1, "rank 1 was killed by SIGSEGV", verdict="CRASHED", slow=True)
def segmentation_fault() -> None:
    if rank() == 1:
        ctypes.string_at(0)  # culprit
    dist.all_reduce(torch.ones(3))  # victim


@planted(DESYNC, 1, "rank 1 left with exit code 0", verdict="CRASHED", slow=True)
def leaves_behind_everybodys_back() -> None:
    if rank() == 1:
        os._exit(0)
    dist.all_reduce(torch.ones(3))  # victim


@planted(DESYNC, 1, "rank 1 called broadcast #1 with rank 1 as its root where ranks 0, 2 had rank 0",
         world_size=3)  # fmt: skip
def different_roots() -> None:
    dist.broadcast(torch.ones(4), src=1 if rank() == 1 else 0)  # culprit
    dist.barrier()


@planted(DESYNC, None, "ranks 0-2 in recv", world_size=3)
def a_ring_that_receives_first() -> None:
    dist.recv(torch.zeros(4), (rank() - 1) % 3)  # culprit
    dist.send(torch.ones(4), (rank() + 1) % 3)


@planted(DESYNC, None, "rank 1 in recv", "rank 0 in barrier #1")
def a_message_against_a_barrier() -> None:
    if rank() == 0:
        dist.barrier()  # victim
    else:
        dist.recv(torch.zeros(2), 0)  # culprit


@planted(DESYNC, 1, "rank 1 never reached all_reduce #", stall=4)
def is_stopped_after_what_the_backend_does_by_other_means() -> None:
    dist.reduce_scatter(torch.zeros(4), [torch.ones(4), torch.ones(4)])
    if rank() == 1:
        os.kill(os.getpid(), signal.SIGSTOP)
    dist.all_reduce(torch.ones(4))  # victim


@planted(DESYNC, None, "while a thread of it waits in barrier #1 of group 1, which rank 1 never reached",
         stall=4)  # fmt: skip
def a_side_thread_that_waits_alone() -> None:
    group = dist.new_group()
    thread = threading.Thread(target=lambda: rank() or dist.barrier(group=group))  # culprit
    thread.start()
    thread.join()
    dist.barrier()  # victim
