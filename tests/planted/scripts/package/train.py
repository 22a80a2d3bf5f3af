"""``python -m tests.planted.scripts.package.train``; healthy."""

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from .network import network


def main() -> None:
    dist.init_process_group("gloo")
    model = DistributedDataParallel(network())
    optimizer = torch.optim.AdamW(model.parameters())
    for _ in range(5):
        optimizer.zero_grad()
        model(torch.randn(4, 8)).mean().backward()
        optimizer.step()


if __name__ == "__main__":
    main()
