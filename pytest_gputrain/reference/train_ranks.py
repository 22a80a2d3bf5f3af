"""The ranks of a training run: started by torchrun, prepared by a launcher, or one process alone."""

from __future__ import annotations

import gc
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist

from pytest_gputrain.reference.train_arguments import TrainUsageError


@dataclass(frozen=True)
class Ranks:
    """This process among its likes. device: where it trains."""

    rank: int
    world_size: int
    device: torch.device

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def mean(self, value: float) -> float:
        """The mean of a number over all ranks, on each of them."""
        if self.world_size == 1:
            return value
        total = torch.tensor(value, dtype=torch.float64, device=self.device)
        dist.all_reduce(total)
        return float(total) / self.world_size

    def say(self, text: str) -> None:
        """Print on the first rank; flushed, so that a run that is ended has said how far it came."""
        if self.is_first:
            print(text, flush=True)

    def clock(self) -> float:
        """Seconds, when what was asked of the device has been done."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()


@contextmanager
def ranks(device: str) -> Iterator[Ranks]:
    """Join the group that the environment describes, or that is there already; leave one made here."""
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    mine = _device(device)
    if mine.type == "cuda":
        torch.cuda.set_device(mine)
    made = world_size > 1 and not dist.is_initialized()
    if made:
        dist.init_process_group("nccl" if mine.type == "cuda" else "gloo")
    try:
        yield Ranks(int(os.environ.get("RANK", "0")) if world_size > 1 else 0, world_size, mine)
    finally:
        # Not with an exception on its way: the others may be in a collective, and NCCL would wait for them.
        if made and sys.exc_info()[0] is None:
            # A DDP model that is still there, if only as garbage, or a rank that still needs this one, makes
            # gloo abort the process now and then (torch 2.13).
            gc.collect()
            dist.barrier()
            dist.destroy_process_group()


def _device(wanted: str) -> torch.device:
    there = torch.cuda.device_count() if wanted != "cpu" else 0
    local = int(os.environ.get("LOCAL_RANK", "0"))
    if wanted == "cuda" and not there:
        raise TrainUsageError("--device cuda: torch sees no GPU here; give --device cpu")
    if not there:
        return torch.device("cpu")
    if local >= there and dist.is_initialized():  # by a launcher that lets ranks share, through gloo
        return torch.device("cuda", local % there)
    if local >= there:
        raise TrainUsageError(f"local rank {local} has no GPU of its own ({there} here); start fewer ranks")
    return torch.device("cuda", local)
