"""A norm of all heads' queries together, and that norm where each rank has some of the heads."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from tests.planted.tp_megatron import Megatron, Reduce, all_reduce, run
from tests.planted.tp_model import Attention, Shape


class HeadNorms(nn.Module):
    """The norm of all queries together, as in OLMo 2; of those of all ranks where there are several."""

    def __init__(self, weight: nn.Parameter, group: Any = None, *, both_ways: bool = True) -> None:
        super().__init__()
        self.weight, self.group, self.both_ways = weight, group, both_ways

    def forward(self, x: Tensor) -> Tensor:
        square, width = x.square().sum(-1, keepdim=True), x.size(-1)
        if self.group is not None:
            square = run(SumBothWays if self.both_ways else Reduce, square, self.group)
            width *= dist.get_world_size(self.group)
        return x * (square / width + 1e-6).rsqrt() * self.weight


class SumBothWays(torch.autograd.Function):
    """What every rank has a part of and every rank uses for a part of its own."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any) -> Tensor:
        ctx.group = group
        return all_reduce(x, group)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return all_reduce(grads[0], ctx.group), None


class NormedQueries(Attention):
    def __init__(self, shape: Shape) -> None:
        super().__init__(shape)
        self.query_norm: Any = HeadNorms(nn.Parameter(torch.ones(shape.width)))

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        query, key, value = super().project(x)
        return self.query_norm(query), key, value


class BothWays(Megatron):
    both_ways = True

    def attention(self, attention: Attention) -> None:
        super().attention(attention)
        assert isinstance(attention, NormedQueries)
        weight = self.cut(attention.query_norm.weight, 0)
        attention.query_norm = HeadNorms(weight, self.group, both_ways=self.both_ways)


class OneWay(BothWays):
    """What it sends back is the part of one rank's heads."""

    both_ways = False
