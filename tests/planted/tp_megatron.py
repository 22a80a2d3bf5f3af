"""Tensor parallelism written by hand, as Megatron does it: plain tensors, each rank holding its part.

`Megatron` is right; a planted bug overrides one of its methods.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from tests.planted.tp_model import LM, MLP, Attention, Block, FusedAttention


def all_reduce(x: Tensor, group: Any) -> Tensor:
    total = x.clone().contiguous()
    dist.all_reduce(total, group=group)
    return total


class Copy(torch.autograd.Function):
    """Into a parallel region: the same on all ranks; gradients are summed."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return all_reduce(grads[0], ctx.group), None


class Reduce(torch.autograd.Function):
    """Out of a parallel region: partial sums are added; the gradient is the same on all ranks."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any) -> Tensor:
        return all_reduce(x, group)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return grads[0], None


def all_gather(x: Tensor, dim: int, sizes: list[int], group: Any) -> Tensor:
    """Parts of these sizes along ``dim``, of which one may be smaller, as one tensor."""
    padding = [0, 0] * (x.dim() - 1 - dim) + [0, max(sizes) - x.size(dim)]
    padded = F.pad(x, padding).contiguous()
    parts = [torch.empty_like(padded) for _ in sizes]
    dist.all_gather(parts, padded, group=group)
    return torch.cat([part.narrow(dim, 0, size) for part, size in zip(parts, sizes, strict=True)], dim)


class Gather(torch.autograd.Function):
    """Parts along a dimension are joined; each rank's part of the gradient is its own."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, dim: int, sizes: list[int], rank: int, group: Any) -> Tensor:
        ctx.cut = dim, sum(sizes[:rank]), sizes[rank]
        return all_gather(x, dim, sizes, group)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return grads[0].narrow(*ctx.cut).contiguous(), None, None, None, None


class GatherSequence(torch.autograd.Function):
    """The sequence's parts are joined on the way into a parallel region; gradients are summed and cut."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, sizes: list[int], rank: int, group: Any) -> Tensor:
        ctx.cut, ctx.group = (1, sum(sizes[:rank]), sizes[rank]), group
        return all_gather(x, 1, sizes, group)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return all_reduce(grads[0], ctx.group).narrow(*ctx.cut).contiguous(), None, None, None


class ScatterSum(torch.autograd.Function):
    """Partial sums are added and each rank keeps its part of the sequence; gradients are joined."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, sizes: list[int], rank: int, group: Any) -> Tensor:
        ctx.sizes, ctx.group = sizes, group
        return all_reduce(x, group).narrow(1, sum(sizes[:rank]), sizes[rank]).contiguous()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return all_gather(grads[0], 1, ctx.sizes, ctx.group), None, None, None


def sizes_of(length: int, parts: int) -> list[int]:
    """As torch.chunk cuts: equal ones, the last smaller."""
    step = -(-length // parts)
    return [max(0, min(step, length - step * part)) for part in range(parts)]


class Megatron:
    """Makes an `LM` tensor parallel in place."""

    rank: int
    size: int

    def __init__(self, mesh: Any) -> None:
        self.group, self.rank, self.size = mesh.get_group(), mesh.get_local_rank(), mesh.size()

    def __call__(self, model: LM) -> LM:
        # Cut once where weights are tied, so that they still are.
        tied = model.head.weight is model.embed.weight
        model.embed = self.embedding(model.embed)
        for block in model.blocks:
            self.block(block)
        model.norm = self.replicated(model.norm)
        model.head = self.head(model.head)
        if tied:
            self.tie(model)
        return model

    def tie(self, model: LM) -> None:
        model.head.weight = model.embed.weight

    def block(self, block: Block) -> None:
        block.norm1, block.norm2 = self.replicated(block.norm1), self.replicated(block.norm2)
        block.dropout = self.replicated_dropout(block.dropout)
        self.attention(block.attention)
        self.mlp(block.mlp)

    def attention(self, attention: Attention) -> None:
        if isinstance(attention, FusedAttention):
            attention.qkv = self.fused(attention.qkv, attention.head_width)
        else:
            attention.query = self.column(attention.query)
            whole = attention.kv_heads % self.size != 0
            attention.key = self.shared(attention.key) if whole else self.column(attention.key)
            attention.value = self.shared(attention.value) if whole else self.column(attention.value)
        attention.out = self.row(attention.out)
        self.divide_heads(attention)

    def divide_heads(self, attention: Attention) -> None:
        attention.heads //= self.size
        if attention.kv_heads % self.size == 0:
            attention.kv_heads //= self.size

    def mlp(self, mlp: MLP) -> None:
        mlp.up, mlp.down = self.column(mlp.up), self.row(mlp.down)
        mlp.dropout = self.sharded_dropout(mlp.dropout)

    def replicated(self, module: nn.Module) -> nn.Module:
        return module

    def replicated_dropout(self, dropout: nn.Dropout) -> nn.Module:
        return dropout

    def sharded_dropout(self, dropout: nn.Dropout) -> nn.Module:
        return RankDropout(dropout.p, self.rank)

    def cut(self, tensor: Tensor, dim: int) -> nn.Parameter:
        """This rank's part, which names the group that has the others."""
        part = tensor.detach().split(sizes_of(tensor.size(dim), self.size), dim)[self.part()]
        return self.owned(part.clone())

    def owned(self, part: Tensor) -> nn.Parameter:
        parameter = nn.Parameter(part)
        parameter.tp_group = self.group  # type: ignore[attr-defined]
        return parameter

    def part(self) -> int:
        return self.rank

    def column(self, linear: nn.Linear) -> nn.Module:
        bias = None if linear.bias is None else self.cut(linear.bias, 0)
        return Column(self, self.cut(linear.weight, 0), bias)

    def row(self, linear: nn.Linear) -> nn.Module:
        return Row(self, self.cut(linear.weight, 1), linear.bias)

    def fused(self, linear: nn.Linear, head_width: int) -> nn.Module:
        """Each of query, key and value is cut, and the parts are joined again."""
        bias = None if linear.bias is None else self.cut_fused(linear.bias)
        return Column(self, self.cut_fused(linear.weight), bias)

    def cut_fused(self, tensor: Tensor) -> nn.Parameter:
        return self.owned(torch.cat([self.cut(part, 0).detach() for part in tensor.chunk(3)]))

    def shared(self, linear: nn.Linear) -> nn.Module:
        """Whole on every rank, each using it for its own query heads: its gradients are to be summed."""
        return Shared(self, linear.weight, linear.bias)

    def embedding(self, embedding: nn.Embedding) -> nn.Module:
        return VocabEmbedding(self, embedding)

    def head(self, linear: nn.Linear) -> nn.Module:
        bias = None if linear.bias is None else self.cut(linear.bias, 0)
        return Head(self, self.cut(linear.weight, 0), bias, sizes_of(linear.out_features, self.size))

    # What goes over the wire.

    def enter(self, x: Tensor) -> Tensor:
        """Into a column layer."""
        return run(Copy, x, self.group)

    def enter_head(self, x: Tensor) -> Tensor:
        return self.enter(x)

    def leave(self, x: Tensor) -> Tensor:
        """Out of a row layer."""
        return run(Reduce, x, self.group)

    def leave_embedding(self, x: Tensor) -> Tensor:
        return run(Reduce, x, self.group)

    def gather(self, logits: Tensor, sizes: list[int]) -> Tensor:
        return run(Gather, logits, logits.dim() - 1, sizes, self.rank, self.group)


def run(function: Any, *args: Any) -> Tensor:
    out: Tensor = function.apply(*args)
    return out


class Column(nn.Module):
    def __init__(self, how: Megatron, weight: Any, bias: Any) -> None:
        super().__init__()
        self.how, self.weight, self.bias = how, weight, bias

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(self.how.enter(x), self.weight, self.bias)


class Row(Column):
    def forward(self, x: Tensor) -> Tensor:
        out = self.how.leave(F.linear(x, self.weight))
        return out if self.bias is None else out + self.bias


class Shared(Column):
    def forward(self, x: Tensor) -> Tensor:
        bias = None if self.bias is None else run(Copy, self.bias, self.how.group)
        return F.linear(self.how.enter(x), run(Copy, self.weight, self.how.group), bias)


class Head(Column):
    """A column layer whose logits are joined."""

    def __init__(self, how: Megatron, weight: Any, bias: Any, sizes: list[int]) -> None:
        super().__init__(how, weight, bias)
        self.sizes = sizes

    def forward(self, x: Tensor) -> Tensor:
        return self.how.gather(F.linear(self.how.enter_head(x), self.weight, self.bias), self.sizes)


class VocabEmbedding(nn.Module):
    """Rows of the vocabulary on each rank; of tokens that lie elsewhere, zeros."""

    def __init__(self, how: Megatron, embedding: nn.Embedding) -> None:
        super().__init__()
        sizes = sizes_of(embedding.num_embeddings, how.size)
        self.how, self.start, self.size = how, sum(sizes[: how.rank]), sizes[how.rank]
        self.weight = how.cut(embedding.weight, 0)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.how.leave_embedding(self.lookup(tokens))

    def lookup(self, tokens: Tensor) -> Tensor:
        elsewhere = (tokens < self.start) | (tokens >= self.start + self.size)
        rows = F.embedding((tokens - self.start).masked_fill(elsewhere, 0), self.weight)
        return rows.masked_fill(elsewhere[..., None], 0.0)


class RankDropout(nn.Dropout):
    """Draws from random numbers of this rank alone, as activations that are cut over ranks need."""

    def __init__(self, p: float, rank: int) -> None:
        super().__init__(p)
        self.state = torch.Generator().manual_seed(1000 + rank).get_state()

    def forward(self, x: Tensor) -> Tensor:
        outer = torch.get_rng_state()
        torch.set_rng_state(self.state)
        out = super().forward(x)
        self.state = torch.get_rng_state()
        torch.set_rng_state(outer)
        return out


class SequenceParallel(Megatron):
    """Outside of parallel regions each rank holds a part of the sequence, which is all that norms see."""

    def __call__(self, model: LM) -> LM:
        model = super().__call__(model)
        model.blocks[0].register_forward_pre_hook(self.scatter)
        return model

    def scatter(self, module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Cut the embeddings; the gradient of the cut is joined again."""
        self.lengths = sizes_of(args[0].size(1), self.size)
        return (run(Scatter, args[0], self.lengths, self.rank, self.group),)

    def replicated(self, module: nn.Module) -> nn.Module:
        for parameter in module.parameters():
            self.sum_gradient(parameter)
        return module

    def row(self, linear: nn.Linear) -> nn.Module:
        if linear.bias is not None:
            self.sum_gradient(linear.bias)
        return super().row(linear)

    def sum_gradient(self, parameter: nn.Parameter) -> None:
        parameter.register_hook(lambda grad: all_reduce(grad, self.group))

    def enter(self, x: Tensor) -> Tensor:
        return run(GatherSequence, x, self.lengths, self.rank, self.group)

    def leave(self, x: Tensor) -> Tensor:
        return run(ScatterSum, x, self.lengths, self.rank, self.group)


class Scatter(torch.autograd.Function):
    """Each rank keeps its part of the sequence; gradients are joined."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, sizes: list[int], rank: int, group: Any) -> Tensor:
        ctx.sizes, ctx.group = sizes, group
        return x.narrow(1, sum(sizes[:rank]), sizes[rank]).contiguous()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return all_gather(grads[0], 1, ctx.sizes, ctx.group), None, None, None


def by(recipe: type[Megatron]) -> Any:
    """``parallelize(model, mesh)`` by that recipe."""
    return lambda model, mesh: recipe(mesh)(model)
