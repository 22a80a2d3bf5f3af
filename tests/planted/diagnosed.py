"""Cases for the phase plan: a branch, a layer or a single process that is at fault, and one that is well."""

from __future__ import annotations

import random
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from pytest_gputrain.case import TrainingCase
from tests.planted.plant import WIDTH, Block, draw, loss

BAD_LAYER, DEPTH = 2, 4


class Layer(Block):
    """random: draws from a generator that checkpointing does not bring back. graph: runs differently when
    it is recomputed.
    """

    def __init__(self, defect: str = "") -> None:
        super().__init__()
        self.defect, self.calls = defect, 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        out = super().forward(x)
        if self.defect == "random":
            out = out * torch.full_like(x, random.random())
        if self.defect == "graph" and self.calls % 2 == 1:
            out = out.tanh().tanh()
        return out


class Raises(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        raise ValueError("no derivative here")


class WaitsOnOneRank(Raises):
    """A collective in backward that only one rank enters: the others wait for its gradient.

    In a group of its own: mixed up with DDP's collectives it would abort, or hang, as it comes.
    """

    group: Any = None

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        if dist.get_rank() == 0 and dist.get_world_size() > 1:
            dist.barrier(WaitsOnOneRank.group)
        return gradient


class Branched(nn.Module):
    """Two branches that are added; ``broken`` stands in the way of one's gradient."""

    branches = ("wide", "narrow")

    def __init__(self, broken: Any) -> None:
        super().__init__()
        self.wide, self.narrow = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.broken, self.alone = broken, ""
        if broken is WaitsOnOneRank and dist.is_initialized():
            WaitsOnOneRank.group = dist.new_group()

    def force_branch(self, name: str) -> None:
        self.alone = name

    def forward(self, x: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        if self.alone in ("", "wide"):
            out = out + self.wide(x)
        if self.alone in ("", "narrow"):
            narrow = self.narrow(x)
            out = out + (narrow if self.broken is None else self.broken.apply(narrow))
        return out


class Layered(nn.Module):
    """Features (batch, 16) -> (batch, 4), through four layers and two branches."""

    def __init__(self, defect: str = "", broken: Any = None) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer(defect if i == BAD_LAYER else "") for i in range(DEPTH))
        self.branched = Branched(broken)
        self.head = nn.Linear(WIDTH, 4)
        self.checkpointed = range(0)

    def forward(self, x: Tensor) -> Tensor:
        for index, layer in enumerate(self.layers):
            on = index in self.checkpointed
            x = checkpoint(layer, x, use_reentrant=False) if on else layer(x)
        out: Tensor = self.head(self.branched(x))
        return out


def set_checkpointing(model: Any, layers: slice | None) -> None:
    model.checkpointed = range(DEPTH)[layers or slice(None)]


def _case(name: str, **fields: Any) -> TrainingCase:
    given = {"model": Layered, "batch": draw, "loss": loss, "set_checkpointing": set_checkpointing}
    return TrainingCase(**{"name": name, **given, **fields})


def _fails_in_the_second_step() -> Any:
    steps = 0

    def step(model: Any, optimizer: Any, micro_batches: Any) -> Tensor:
        nonlocal steps
        steps += 1
        if steps == 2:
            raise ValueError("bad batch")
        optimizer.zero_grad()
        value = loss(model, micro_batches[0])
        value.backward()
        optimizer.step()
        return value.detach()

    return step


healthy = _case("healthy")
one_branch_fails = _case("one_branch_fails", model=lambda: Layered(broken=Raises))
one_branch_hangs = _case("one_branch_hangs", model=lambda: Layered(broken=WaitsOnOneRank))
one_layer_recomputes_differently = _case("one_layer_recomputes_differently", model=lambda: Layered("random"))
one_layer_cannot_be_recomputed = _case("one_layer_cannot_be_recomputed", model=lambda: Layered("graph"))
fails_alone = _case("fails_alone", step=_fails_in_the_second_step())
