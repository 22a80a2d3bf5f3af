"""A sum over ranks that goes on beside other work, as in Megatron's column layers."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from tests.planted.tp_megatron import Column, Megatron, run


class Overlapped(torch.autograd.Function):
    """Megatron's column layer: the input's gradient is summed while the weight's is computed."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, group: Any, waits: bool) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.group, ctx.waits = group, waits
        return F.linear(x, weight)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        x, weight = ctx.saved_tensors
        entering = grads[0] @ weight
        work = dist.all_reduce(entering, group=ctx.group, async_op=True)
        own = grads[0].flatten(0, 1).t() @ x.flatten(0, 1)
        if ctx.waits:
            work.wait()
        return entering, own, None, None


class OverlappedColumn(Column):
    waits = True

    def forward(self, x: Tensor) -> Tensor:
        out = run(Overlapped, x, self.weight, self.how.group, self.waits)
        return out if self.bias is None else out + self.bias


class Overlapping(Megatron):
    kind: type[Column] = OverlappedColumn

    def column(self, linear: nn.Linear) -> nn.Module:
        column: Any = super().column(linear)
        return self.kind(self, column.weight, column.bias)
