"""A mixture of experts, and its experts divided over the ranks."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from tests.planted.tp_megatron import Megatron
from tests.planted.tp_model import LM, MLP, Shape

EXPERTS, CHOSEN = 4, 2


class Mixture(nn.Module):
    """The best two of four MLPs for each token; a rank may have some of the four, from ``first`` on."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.router = nn.Linear(shape.width, EXPERTS, bias=False)
        self.experts = nn.ModuleList(MLP(shape) for _ in range(EXPERTS))
        self.first = 0
        self.how: Any = None

    def forward(self, x: Tensor) -> Tensor:
        scores = self.router(x).softmax(-1)
        best = scores.topk(CHOSEN, -1)
        weights = torch.zeros_like(scores).scatter(-1, best.indices, best.values)
        if self.how is not None:
            x, weights = self.how.enter(x), self.how.enter_weights(weights)
        out = torch.zeros_like(x)
        for number, expert in enumerate(self.experts, self.first):
            if expert is None:  # another rank's
                continue
            out = out + weights[..., number : number + 1] * expert(x)
        summed: Tensor = out if self.how is None else self.how.leave(out)
        return summed


class MixtureLM(LM):
    def __init__(self, shape: Shape) -> None:
        super().__init__(shape)
        for block in self.blocks:
            block.mlp = Mixture(shape)


class ExpertParallel(Megatron):
    """Attention as ever; whole experts on ranks, under the same names on each."""

    def mlp(self, mlp: Any) -> None:
        each = len(mlp.experts) // self.size
        mlp.first = self.rank * each
        mlp.experts = nn.ModuleList(list(mlp.experts)[mlp.first : mlp.first + each])
        mlp.how = self

    def enter_weights(self, weights: Tensor) -> Tensor:
        return self.enter(weights)


class NamedExperts(ExpertParallel):
    """Experts keep their numbers, and so have other names on each rank, as in DeepSeek's own model."""

    def mlp(self, mlp: Any) -> None:
        each = len(mlp.experts) // self.size
        kept: list[Any] = [e if number // each == self.rank else None for number, e in enumerate(mlp.experts)]
        mlp.experts = nn.ModuleList(kept)
        mlp.how = self
