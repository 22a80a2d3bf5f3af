"""The failure that the README shows: rank 1's data set is one batch shorter, so rank 0 waits for ever."""

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel


def train_one_epoch() -> None:
    rank = dist.get_rank()
    model = DistributedDataParallel(torch.nn.Linear(4, 1))
    num_batches = 4 - rank  # 7 batches shared by 2 ranks
    for _ in range(num_batches):
        model(torch.randn(2, 4)).sum().backward()


def test_one_epoch(ddp_launcher):
    ddp_launcher(train_one_epoch, world_size=2)
