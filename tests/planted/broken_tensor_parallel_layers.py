"""Tensor parallelism with a defect in one layer, or for some batches; the rest of it is right."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pytest_gputrain.case import TrainingCase
from tests.planted.tp_experts import ExpertParallel, MixtureLM
from tests.planted.tp_megatron import Column, Megatron, SequenceParallel, all_reduce, by, run
from tests.planted.tp_model import LM, Attention, Block, Shape, broken_tp, tp_case
from tests.planted.tp_norms import NormedQueries, OneWay


class ParallelBlock(Block):
    """Attention and MLP side by side on one norm, as in GPT-J and Phi."""

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm1(x)
        out: Tensor = x + self.attention(h) + self.mlp(h)
        return out


class ParallelLM(LM):
    def __init__(self, shape: Shape) -> None:
        super().__init__(shape)
        self.blocks = nn.ModuleList(ParallelBlock(shape, Attention) for _ in range(shape.layers))
        for block in self.blocks:
            del block.norm2


class OneBranch(Megatron):
    """The input's gradient is summed before attention, and not before the MLP of one block."""

    def block(self, block: Block) -> None:
        block.norm1, block.dropout = self.replicated(block.norm1), self.replicated_dropout(block.dropout)
        self.attention(block.attention)
        self.mlp(block.mlp)

    def __call__(self, model: LM) -> LM:
        model = super().__call__(model)
        up = model.blocks[0].mlp.up
        up.forward = lambda x: F.linear(x, up.weight, up.bias)
        return model


@broken_tp("tp_backward", "blocks.0.mlp.up (input gradient is not summed over the 2 ranks)")
def no_backward_reduce_in_one_of_two_branches() -> TrainingCase:
    fields = {"model": partial(ParallelLM, Shape())}
    return tp_case("no_backward_reduce_in_one_of_two_branches", by(OneBranch), fields=fields)


class SharedLM(LM):
    """One block in every place, as in ALBERT."""

    def __init__(self, shape: Shape) -> None:
        super().__init__(shape)
        self.times = len(self.blocks)
        self.blocks = self.blocks[:1]

    def forward(self, tokens: Tensor) -> Tensor:
        places = torch.arange(tokens.size(1), device=tokens.device)
        x = self.embed(tokens) + self.positions(places)
        for _ in range(self.times):
            x = self.blocks[0](x)
        logits: Tensor = self.head(self.norm(x))
        return logits


class CarelessAtSecondCall(Column):
    calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return F.linear(x if self.calls % 3 == 2 else self.how.enter(x), self.weight, self.bias)


class SecondCall(Megatron):
    def mlp(self, mlp: Any) -> None:
        super().mlp(mlp)
        mlp.up = CarelessAtSecondCall(self, mlp.up.weight, mlp.up.bias)


@broken_tp("tp_backward", "blocks.0.mlp.up (call 2) (input gradient is not summed over the 2 ranks)")
def no_backward_reduce_at_the_second_call() -> TrainingCase:
    fields = {"model": partial(SharedLM, Shape(layers=3))}
    return tp_case("no_backward_reduce_at_the_second_call", by(SecondCall), fields=fields)


class ShortSum(torch.autograd.Function):
    """Sums gradients in bfloat16, to send half as much."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return all_reduce(grads[0].bfloat16(), ctx.group).to(grads[0].dtype), None


class ShortSums(Megatron):
    def enter(self, x: Tensor) -> Tensor:
        return run(ShortSum, x, self.group)


@broken_tp(
    "tp_backward", "(input gradient is bfloat16 in all its values: a sum over ranks, or a cast, in that"
)
def gradients_summed_in_bfloat16() -> TrainingCase:
    return tp_case("gradients_summed_in_bfloat16", by(ShortSums))


class CarelessWithFour(Column):
    """A way of its own for large batches, where the input's gradient is not summed."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x if len(x) >= 4 else self.how.enter(x), self.weight, self.bias)


class OtherWayForFour(Megatron):
    def mlp(self, mlp: Any) -> None:
        super().mlp(mlp)
        mlp.up = CarelessWithFour(self, mlp.up.weight, mlp.up.bias)


@broken_tp("tp_training", "in a batch of 4: blocks.1.norm2.weight.grad is off by")
def no_backward_reduce_for_large_batches() -> TrainingCase:
    return tp_case("no_backward_reduce_for_large_batches", by(OtherWayForFour))


class OneLeftWhole(Megatron):
    def __call__(self, model: LM) -> LM:
        self.left = model.blocks[1].mlp
        return super().__call__(model)

    def mlp(self, mlp: Any) -> None:
        if mlp is not self.left:
            super().mlp(mlp)


@broken_tp(
    "tp_memory", "blocks.1.mlp.up.weight is whole on every rank, and cut in the 3 other layers that have"
)
def mlp_of_one_layer_left_whole() -> TrainingCase:
    return tp_case("mlp_of_one_layer_left_whole", by(OneLeftWhole), layers=4)


class Whole(torch.autograd.Function):
    """A whole weight in place of a part, to which it hands its part of the gradient."""

    @staticmethod
    def forward(ctx: Any, part: Tensor, whole: Tensor, dim: int, start: int) -> Tensor:
        ctx.cut = dim, start, part.size(dim)
        return whole.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return grads[0].narrow(*ctx.cut), None, None, None


class WholeBesideItsParts(OneLeftWhole):
    """One MLP is cut, and computes with what it was before."""

    def mlp(self, mlp: Any) -> None:
        whole = [weight.detach().clone() for weight in (mlp.up.weight, mlp.up.bias, mlp.down.weight)]
        super(OneLeftWhole, self).mlp(mlp)
        if mlp is self.left:
            start, bias = self.rank * mlp.up.weight.size(0), mlp.down.bias
            parts = [(mlp.up.weight, 0), (mlp.up.bias, 0), (mlp.down.weight, 1)]

            def forward(x: Tensor) -> Tensor:
                up, up_bias, down = (
                    run(Whole, part, all_of_it, dim, start)
                    for (part, dim), all_of_it in zip(parts, whole, strict=True)
                )
                return F.linear(F.gelu(F.linear(x, up, up_bias)), down, bias)

            mlp.forward = forward


@broken_tp("tp_memory", "changing rank 1's part of blocks.1.mlp.up.weight changes no output: it is not used")
def one_layer_computes_with_the_whole_weights() -> TrainingCase:
    return tp_case("one_layer_computes_with_the_whole_weights", by(WholeBesideItsParts))


class RouterNotSummed(ExpertParallel):
    def enter_weights(self, weights: Tensor) -> Tensor:
        return weights


@broken_tp("tp_backward", "blocks.1.mlp.router (gradient is not summed over the 2 ranks)")
def routers_gradient_partial() -> TrainingCase:
    fields = {"model": partial(MixtureLM, Shape())}
    return tp_case("routers_gradient_partial", by(RouterNotSummed), fields=fields)


class PaddedInFront(SequenceParallel):
    """Sequences that the ranks do not divide are filled up, at the end where positions begin."""

    def __call__(self, model: LM) -> LM:
        model = super().__call__(model)
        inner = model.forward

        def forward(tokens: Tensor) -> Tensor:
            fill = -tokens.size(1) % self.size
            return inner(F.pad(tokens, (fill, 0)))[:, fill:]

        model.forward = forward  # type: ignore[method-assign]
        return model


@broken_tp("tp_forward", "logits for an input of (1, 5) are off by")
def uneven_sequences_padded_in_front() -> TrainingCase:
    return tp_case("uneven_sequences_padded_in_front", by(PaddedInFront))


def optimizer_of_linear_layers(model: nn.Module) -> Any:
    """Layers of other classes than it knows are left out, as the parallel ones are."""
    kinds = (nn.Linear, nn.Embedding, nn.LayerNorm)
    known = [p for module in model.modules() if isinstance(module, kinds) for p in module.parameters(False)]
    return torch.optim.AdamW(dict.fromkeys(known), lr=1e-3)


@broken_tp("tp_optimizers", "is not in the case's optimizer's parameters, as it is in a single process")
def optimizer_without_the_parallel_layers() -> TrainingCase:
    return tp_case(
        "optimizer_without_the_parallel_layers",
        by(Megatron),
        fields={"optimizer": optimizer_of_linear_layers},
    )


@broken_tp("tp_backward", "first layer to depart, going backward: blocks.1.attention.query_norm")
def norm_over_all_heads_summed_forward_only() -> TrainingCase:
    return tp_case("norm_over_all_heads_summed_forward_only", by(OneWay), attention=NormedQueries)
