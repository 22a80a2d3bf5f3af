"""A world of one rank around a probe: data parallel as in training, without the other ranks.

A rank that probes alone must not meet the others in a collective: when it runs out of memory, they would wait
for ever. So for the time of a probe the default process group has this rank only (by gloo, which makes no
NCCL communicator of its own on the GPU). DistributedDataParallel is then real, its buckets included, which
are one more copy of the gradients. Collectives of the user's own loop run in that group as well. What is not
covered: code that keeps process groups of its own, and sharded models.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator

import torch.distributed as dist
from torch._C._distributed_c10d import HashStore  # dist.HashStore, which has no type


def others_are_there() -> bool:
    """Whether this process belongs to a process group of several ranks."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def can_be_made() -> bool:
    """Whether this build of torch can make a process group of one rank."""
    return dist.is_available() and dist.is_gloo_available()


@contextlib.contextmanager
def of_one() -> Iterator[None]:
    """The default process group has this rank only; afterwards it is the one, or the none, that it was."""
    if not dist.is_initialized():
        with _made_for_now():
            yield
    elif dist.get_world_size() == 1:
        yield
    else:
        with _instead_of_the_real_one():
            yield


@contextlib.contextmanager
def _made_for_now() -> Iterator[None]:
    excepthook = sys.excepthook  # init_process_group sets its own
    dist.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()
        sys.excepthook = excepthook


@contextlib.contextmanager
def _instead_of_the_real_one() -> Iterator[None]:
    # Local synchronisation: no other rank takes part, and torch's count of groups, which has to be the same
    # on every rank, stays as it is.
    alone = dist.new_group([dist.get_rank()], backend="gloo", use_local_synchronization=True)
    c10d = dist.distributed_c10d
    real = c10d.GroupMember.WORLD
    c10d._update_default_pg(alone)  # private, and the only way: wrap() and step() are the user's
    try:
        yield
    finally:
        c10d._update_default_pg(real)
        dist.destroy_process_group(alone)
