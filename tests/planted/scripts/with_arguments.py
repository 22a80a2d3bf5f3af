"""A script with arguments and a launcher environment of its own; ``--defect`` plants one known defect.

It asks for NCCL, as such scripts do, and reads its rank by itself (``init_method="env://"`` with the numbers
given), so that nothing but the environment tells it where it is.
"""

import argparse
import os
import random
import time
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

BAD_LAYER = 2
DEFECTS = ("none", "unused", "uneven", "conditional", "busy", "recompute", "branch", "own_checkpoint")


class Layer(nn.Module):
    def __init__(self, index: int, defect: str) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)
        self.noisy = defect == "recompute" and index == BAD_LAYER

    def forward(self, x: Tensor) -> Tensor:
        # Not torch's generator: checkpointing does not bring this number back when it recomputes.
        scale = torch.full_like(x, random.random() if self.noisy else 1.0)
        return x + scale * torch.tanh(self.linear(x))


class OnlyOneRankReduces(torch.autograd.Function):
    """Its backward communicates on rank 0 alone, in a group of its own: with DDP's it would abort instead."""

    group: Any = None

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        if dist.get_rank() == 0 and dist.get_world_size() > 1:
            dist.all_reduce(gradient, group=OnlyOneRankReduces.group)
        return gradient


def reduced(x: Tensor) -> Tensor:
    out: Tensor = OnlyOneRankReduces.apply(x)  # type: ignore[no-untyped-call]
    return out


class Branched(nn.Module):
    """Two branches that are added; each can be run alone."""

    branches = ("wide", "narrow")

    def __init__(self, defect: str) -> None:
        super().__init__()
        self.wide, self.narrow = nn.Linear(8, 8), nn.Linear(8, 8)
        self.defect = defect
        self.alone = ""

    def force_branch(self, name: str) -> None:
        self.alone = name

    def forward(self, x: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        if self.alone in ("", "wide"):
            out = out + self.wide(x)
        if self.alone in ("", "narrow"):
            narrow = self.narrow(x)
            out = out + (reduced(narrow) if self.defect == "branch" else narrow)
        return out


class Model(nn.Module):
    def __init__(self, defect: str) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer(index, defect) for index in range(5))
        self.branched = Branched(defect)
        self.extra = nn.Linear(8, 8) if defect == "unused" else None
        self.checkpointed = defect == "own_checkpoint"

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = checkpoint(layer, x, use_reentrant=False) if self.checkpointed else layer(x)
        out: Tensor = self.branched(x)
        return out


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--defect", choices=DEFECTS, default="none")
    parser.add_argument("--seconds", type=float, default=0.0, help="that a step takes")
    options = parser.parse_args()
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    dist.init_process_group("nccl", init_method="env://", rank=rank, world_size=size)
    OnlyOneRankReduces.group = dist.new_group()
    train(options, rank)


def train(options: argparse.Namespace, rank: int) -> None:
    model = DistributedDataParallel(Model(options.defect))
    optimizer = torch.optim.AdamW(model.parameters())
    for _ in range(options.steps - (options.defect == "uneven" and rank == 1)):
        optimizer.zero_grad()
        loss = model(torch.randn(4, 8)).square().mean()
        loss.backward()
        if options.defect == "conditional" and rank == 0 and dist.get_world_size() > 1:
            dist.all_reduce(loss.detach(), group=OnlyOneRankReduces.group)
        until = time.monotonic() + options.seconds
        while time.monotonic() < until:
            pass
        optimizer.step()


if __name__ == "__main__":
    main()
