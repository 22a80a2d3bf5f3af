"""Tensor parallelism by hand with one defect each. Most are blind spots of a comparison of logits."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from pytest_gputrain.case import TrainingCase
from tests.planted.tp_loops import clip_all, clipped, local_cross_entropy
from tests.planted.tp_megatron import (
    Column,
    Copy,
    Megatron,
    RankDropout,
    Row,
    SequenceParallel,
    VocabEmbedding,
    all_gather,
    all_reduce,
    by,
    run,
)
from tests.planted.tp_model import LM, Attention, FusedAttention, broken_tp, tp_case


class EarlyBias(Row):
    def forward(self, x: Tensor) -> Tensor:
        return self.how.leave(F.linear(x, self.weight, self.bias))


class BiasOnEveryRank(Megatron):
    def row(self, linear: nn.Linear) -> nn.Module:
        return EarlyBias(self, self.cut(linear.weight, 1), linear.bias)


@broken_tp("tp_forward", "Largest absolute diff at")
def row_bias_added_on_every_rank() -> TrainingCase:
    return tp_case("row_bias_added_on_every_rank", by(BiasOnEveryRank))


@broken_tp("tp_forward", "are off by")
def row_bias_added_on_every_rank_while_it_is_zero() -> TrainingCase:
    """As in OPT and GPT-2 at the start: nothing shows until the bias has moved."""
    return tp_case("row_bias_added_on_every_rank_while_it_is_zero", by(BiasOnEveryRank), zero_bias=True)


class NoBackwardReduce(Megatron):
    def enter(self, x: Tensor) -> Tensor:
        return x

    def enter_head(self, x: Tensor) -> Tensor:
        return super().enter(x)


@broken_tp("tp_backward", "blocks.1.mlp.up (input gradient is not summed over the 2 ranks)")
def no_backward_reduce_before_column_layers() -> TrainingCase:
    return tp_case("no_backward_reduce_before_column_layers", by(NoBackwardReduce))


class NoBackwardReduceInOneMLP(Megatron):
    def __call__(self, model: LM) -> LM:
        model = super().__call__(model)
        model.blocks[0].mlp.up = Careless(self, model.blocks[0].mlp.up.weight, model.blocks[0].mlp.up.bias)
        return model


class Careless(Column):
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)


@broken_tp("tp_backward", "blocks.0.mlp.up (input gradient is not summed over the 2 ranks)")
def no_backward_reduce_in_the_first_mlp_alone() -> TrainingCase:
    return tp_case("no_backward_reduce_in_the_first_mlp_alone", by(NoBackwardReduceInOneMLP))


class NoBackwardReduceAtHead(Megatron):
    def enter_head(self, x: Tensor) -> Tensor:
        return x


@broken_tp("tp_backward", "head (input gradient is not summed over the 2 ranks)")
def no_backward_reduce_before_the_head() -> TrainingCase:
    return tp_case("no_backward_reduce_before_the_head", by(NoBackwardReduceAtHead))


class LastBits(torch.autograd.Function):
    """The gradient of what is whole on every rank, rounded in another way on each."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, rank: int) -> Tensor:
        ctx.rank = rank
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return grads[0] * (1 + 1e-6 * ctx.rank), None


class RoundedByRank(Megatron):
    def replicated(self, module: nn.Module) -> nn.Module:
        module.register_forward_hook(lambda m, inputs, out: run(LastBits, out, self.rank))
        return module


@broken_tp("tp_backward", "is replicated, but its gradient is not bit by bit the same on all 2 ranks")
def replicated_gradients_differ_in_the_last_bits() -> TrainingCase:
    return tp_case("replicated_gradients_differ_in_the_last_bits", by(RoundedByRank))


class ReduceTwice(torch.autograd.Function):
    """Sums in both directions, as torch.distributed.nn's all_reduce does."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any) -> Tensor:
        ctx.group = group
        return all_reduce(x, group)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return all_reduce(grads[0], ctx.group), None


class DoubledBackward(Megatron):
    def leave(self, x: Tensor) -> Tensor:
        return run(ReduceTwice, x, self.group)


@broken_tp("tp_backward", "blocks.1.mlp.down (gradient is 2 times the reference's")
def reduction_doubled_in_backward() -> TrainingCase:
    return tp_case("reduction_doubled_in_backward", by(DoubledBackward))


class DoubledForward(Megatron):
    def leave(self, x: Tensor) -> Tensor:
        return super().leave(super().leave(x))


@broken_tp("tp_forward", "are off by")
def reduction_doubled_in_forward() -> TrainingCase:
    return tp_case("reduction_doubled_in_forward", by(DoubledForward))


class AveragedBackward(Megatron):
    def enter(self, x: Tensor) -> Tensor:
        return run(CopyMean, x, self.group)


class CopyMean(Copy):
    """Averages, as one does for data parallelism."""

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return all_reduce(grads[0], ctx.group) / dist.get_world_size(ctx.group), None


@broken_tp("tp_backward", "gradient is 1/2 of the reference's")
def gradients_averaged_as_in_data_parallel() -> TrainingCase:
    return tp_case("gradients_averaged_as_in_data_parallel", by(AveragedBackward))


class NoForwardReduce(Megatron):
    def leave(self, x: Tensor) -> Tensor:
        return x


@broken_tp("tp_forward", "are off by")
def no_forward_reduce() -> TrainingCase:
    return tp_case("no_forward_reduce", by(NoForwardReduce))


class DetachingReduce(Megatron):
    def leave(self, x: Tensor) -> Tensor:
        total = x.detach().clone()
        dist.all_reduce(total, group=self.group)
        return total


@broken_tp("tp_backward", "has no gradient on any rank")
def reduced_behind_autograd() -> TrainingCase:
    return tp_case("reduced_behind_autograd", by(DetachingReduce))


class DetachingGather(Megatron):
    def gather(self, logits: Tensor, sizes: list[int]) -> Tensor:
        return run(GatherSums, logits, sizes, self.rank, self.group)


class GatherSums(torch.autograd.Function):
    """Its backward sums what all ranks send back, as torch.distributed.nn's all_gather does."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, sizes: list[int], rank: int, group: Any) -> Tensor:
        ctx.cut, ctx.group = (x.dim() - 1, sum(sizes[:rank]), sizes[rank]), group
        return all_gather(x, x.dim() - 1, sizes, group)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return all_reduce(grads[0], ctx.group).narrow(*ctx.cut).contiguous(), None, None, None


@broken_tp("tp_backward", "head (gradient is 2 times the reference's")
def logits_gathered_with_a_sum_in_backward() -> TrainingCase:
    return tp_case("logits_gathered_with_a_sum_in_backward", by(DetachingGather))


class PartialNorms(SequenceParallel):
    def replicated(self, module: nn.Module) -> nn.Module:
        return module


@broken_tp("tp_backward", "norm (gradient is not summed over the 2 ranks)")
def norm_gradients_partial_under_sequence_parallel() -> TrainingCase:
    return tp_case("norm_gradients_partial_under_sequence_parallel", by(PartialNorms))


class PartialBiases(SequenceParallel):
    def row(self, linear: nn.Linear) -> nn.Module:
        return Megatron.row(self, linear)


@broken_tp("tp_backward", "blocks.1.mlp.down (gradient is not summed")
def row_bias_gradients_partial_under_sequence_parallel() -> TrainingCase:
    return tp_case("row_bias_gradients_partial_under_sequence_parallel", by(PartialBiases))


class PaddedVocabulary(Megatron):
    """The vocabulary is filled up to a multiple of the ranks, and the logits of the filling are kept."""

    def head(self, linear: nn.Linear) -> nn.Module:
        fill = -linear.out_features % self.size
        padded = nn.Linear(linear.in_features, linear.out_features + fill)
        with torch.no_grad():
            padded.weight.copy_(F.pad(linear.weight, [0, 0, 0, fill]))
            padded.bias.copy_(F.pad(linear.bias, [0, fill]))
        return super().head(padded)


@broken_tp("tp_forward", "the loss for an input of")
def vocabulary_padding_not_masked() -> TrainingCase:
    return tp_case("vocabulary_padding_not_masked", by(PaddedVocabulary), vocab=41)


class UnmaskedEmbedding(VocabEmbedding):
    def lookup(self, tokens: Tensor) -> Tensor:
        return F.embedding((tokens - self.start).clamp(0, self.size - 1), self.weight)


class TokensNotMasked(Megatron):
    def embedding(self, embedding: nn.Embedding) -> nn.Module:
        return UnmaskedEmbedding(self, embedding)


@broken_tp("tp_forward", "are off by")
def tokens_of_other_shards_not_masked() -> TrainingCase:
    return tp_case("tokens_of_other_shards_not_masked", by(TokensNotMasked))


class LostRemainder(Megatron):
    """The vocabulary is cut by whole division, and its last row has no owner."""

    def embedding(self, embedding: nn.Embedding) -> nn.Module:
        kept = embedding.num_embeddings // self.size * self.size
        return super().embedding(nn.Embedding(kept, embedding.embedding_dim, _weight=embedding.weight[:kept]))


@broken_tp("tp_forward", "embed.weight, 4 to 4 of 5 on dimension 0, is on no rank")
def last_token_of_an_odd_vocabulary_lost() -> TrainingCase:
    return tp_case("last_token_of_an_odd_vocabulary_lost", by(LostRemainder), vocab=5)


class LocalLogits(Megatron):
    def gather(self, logits: Tensor, sizes: list[int]) -> Tensor:
        return logits


@broken_tp("tp_backward", "the loss for an input of", may_fail=("ddp_completes", "ddp_parity"))
def cross_entropy_on_the_local_vocabulary() -> TrainingCase:
    return tp_case(
        "cross_entropy_on_the_local_vocabulary", by(LocalLogits), fields={"loss": local_cross_entropy}
    )


class SameShard(Megatron):
    def part(self) -> int:
        return 0


@broken_tp("tp_forward", "every rank holds the same part: embed.weight")
def same_shard_everywhere() -> TrainingCase:
    return tp_case("same_shard_everywhere", by(SameShard))


class PositionsByRank(Megatron):
    def __call__(self, model: LM) -> LM:
        model = super().__call__(model)
        torch.manual_seed(self.rank)
        nn.init.normal_(model.positions.weight, std=0.02)
        return model


@broken_tp("tp_forward", "positions.weight is not the reference's")
def replicated_parameter_initialised_by_rank() -> TrainingCase:
    return tp_case("replicated_parameter_initialised_by_rank", by(PositionsByRank))


class ResidualDropoutByRank(Megatron):
    def replicated_dropout(self, dropout: nn.Dropout) -> nn.Module:
        return RankDropout(dropout.p, self.rank)


@broken_tp("tp_training", "dropout in blocks.0.dropout drops other elements")
def dropout_differs_on_replicated_activations() -> TrainingCase:
    return tp_case("dropout_differs_on_replicated_activations", by(ResidualDropoutByRank), dropout=0.1)


class Untied(Megatron):
    def tie(self, model: LM) -> None:
        pass


@broken_tp("tp_backward", "no longer tied")
def tied_weights_untied() -> TrainingCase:
    return tp_case("tied_weights_untied", by(Untied), tied=True)


@broken_tp("tp_optimizers", "in the case's step the optimizer gets wrong gradients")
def clipping_by_local_norms() -> TrainingCase:
    return tp_case("clipping_by_local_norms", by(Megatron), fields={"step": clipped(clip_all)})


def untouched(model: LM, mesh: Any) -> LM:
    return model


@broken_tp("tp_memory", "nothing is sharded")
def fake_tensor_parallel() -> TrainingCase:
    return tp_case("fake_tensor_parallel", untouched)


class DisguisedColumn(nn.Module):
    """Holds everything and communicates, to no effect."""

    def __init__(self, inner: nn.Module, group: Any) -> None:
        super().__init__()
        self.inner, self.group = inner, group

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.inner(x)
        return run(CopyMean, all_reduce(out.detach(), self.group) * 0 + out, self.group)


def disguised(model: LM, mesh: Any) -> LM:
    for block in model.blocks:
        block.mlp = DisguisedColumn(block.mlp, mesh.get_group())
    return model


@broken_tp("tp_memory", "nothing is sharded")
def fake_tensor_parallel_that_communicates() -> TrainingCase:
    return tp_case("fake_tensor_parallel_that_communicates", disguised)


class ShardsBesideTheWhole(Megatron):
    """Cuts the weights, and trains the whole ones."""

    def column(self, linear: nn.Linear) -> nn.Module:
        linear.shard = self.cut(linear.weight, 0)
        return linear

    def row(self, linear: nn.Linear) -> nn.Module:
        linear.shard = self.cut(linear.weight, 1)
        return linear

    def divide_heads(self, attention: Attention) -> None:
        pass


@broken_tp("tp_memory", "overhead 79 %")
def shards_that_nobody_uses() -> TrainingCase:
    return tp_case("shards_that_nobody_uses", by(ShardsBesideTheWhole))


class HeadsNotDivided(Megatron):
    def divide_heads(self, attention: Attention) -> None:
        pass


@broken_tp("tp_forward", "are off by")
def heads_not_divided() -> TrainingCase:
    return tp_case("heads_not_divided", by(HeadsNotDivided))


class FusedInOnePiece(Megatron):
    def cut_fused(self, tensor: Tensor) -> nn.Parameter:
        return self.cut(tensor, 0)


@broken_tp("tp_forward", "are off by")
def fused_query_key_value_cut_in_one_piece() -> TrainingCase:
    return tp_case("fused_query_key_value_cut_in_one_piece", by(FusedInOnePiece), attention=FusedAttention)


class KeysNotSummed(Megatron):
    def shared(self, linear: nn.Linear) -> nn.Module:
        return Column(self, linear.weight, linear.bias)


@broken_tp("tp_backward", "blocks.1.attention.value (gradient is not summed")
def gradients_of_replicated_key_heads_not_summed() -> TrainingCase:
    return tp_case("gradients_of_replicated_key_heads_not_summed", by(KeysNotSummed), kv_heads=1)


class MlpForgotten(Megatron):
    """Half of the layers stay whole."""

    def mlp(self, mlp: Any) -> None:
        pass


@broken_tp("tp_memory", "overhead 73 %")
def only_attention_is_sharded() -> TrainingCase:
    return tp_case("only_attention_is_sharded", by(MlpForgotten), hidden=128)
