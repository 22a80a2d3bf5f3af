"""Small models that are tried at many batch sizes, each with one habit that a discovery has to cope with."""

from __future__ import annotations

import random
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pytest_gputrain.case import TrainingCase

WIDTH = 32


class Language(nn.Module):
    """``model(x, y)``: the loss. ``copies``: how often its layer runs, and so the memory a sample takes."""

    def __init__(self, copies: int = 1, returns: str = "loss", vocab_size: int = 64) -> None:
        super().__init__()
        self.copies, self.returns = copies, returns
        self.embedding = nn.Embedding(vocab_size, WIDTH)
        self.layer = nn.Linear(WIDTH, WIDTH)
        self.head = nn.Linear(WIDTH, vocab_size)

    def forward(self, x: Tensor, y: Tensor) -> Any:
        hidden = self.embedding(x)
        for _ in range(self.copies):
            hidden = torch.relu(self.layer(hidden))
        logits = self.head(hidden)
        loss = F.cross_entropy(logits.flatten(0, 1), y.flatten())
        return {"loss": loss, "tuple": (logits, loss), "mapping": {"logits": logits, "loss": loss},
                "logits": logits, "detached": loss.detach(), "count": y.sum()}[self.returns]  # fmt: skip


class Restless(nn.Module):
    """Changes everything that it can reach: statistics, attributes, hooks, generators, flags."""

    mask: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(16, WIDTH), nn.Linear(WIDTH, 16)
        self.norm, self.drop = nn.BatchNorm1d(WIDTH), nn.Dropout(0.5)
        self.tied = nn.Linear(WIDTH, 16)
        self.tied.weight = self.last.weight
        self.first.bias.requires_grad_(False)
        self.norm.eval()
        self.register_buffer("mask", torch.ones(1).expand(4, 4))
        self.average, self.calls, self.seen = torch.zeros(3), 0, list[Tensor]()

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.average += 1
        self.seen.append(x.detach())
        self.kept = nn.Parameter(torch.zeros(2))
        self.register_forward_hook(lambda *_: None)
        random.random()
        torch.backends.cudnn.benchmark = not torch.backends.cudnn.benchmark
        self.norm.train()
        hidden = self.drop(self.norm(self.first(x)))
        out: Tensor = self.last(hidden) + self.tied(hidden)
        return out


def rows(batch_size: int, device: Any, width: int = 16) -> Tensor:
    return torch.randn(batch_size, width, device=device)


def square(model: Any, batch: Tensor) -> Tensor:
    loss: Tensor = model(batch).square().mean()
    return loss


def mlp(width: int = 64, layers: int = 2) -> nn.Module:
    blocks = [layer for _ in range(layers) for layer in (nn.Linear(width, width), nn.ReLU())]
    return nn.Sequential(*blocks)


def case_of(model: Any, **fields: Any) -> TrainingCase:
    given = {"name": "planted", "batch": rows, "loss": square, **fields}
    return TrainingCase(model=model, **given)
