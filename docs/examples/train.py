"""A training script as people have it: run with torchrun, nothing in it knows of tests."""

import argparse
import os

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel


def train(steps: int, rank: int) -> float:
    torch.manual_seed(0)
    model = DistributedDataParallel(nn.Linear(8, 1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    torch.manual_seed(rank)
    for _ in range(steps):
        loss = model(torch.randn(4, 8)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return loss.item()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=4)
    steps = parser.parse_args().steps

    dist.init_process_group("gloo")
    loss = train(steps, dist.get_rank())
    print(f"rank {os.environ['RANK']} done, loss {loss:.3f}")
    # The DDP model is gone by now: destroying its group under it can hang or abort (a race in torch on gloo).
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
