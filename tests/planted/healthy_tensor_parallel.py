"""Tensor parallelism that is right, by hand and by DTensor, in the forms that look suspicious."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from pytest_gputrain.case import TrainingCase
from tests.planted.plant import healthy
from tests.planted.tp_dtensor import by_plan, plan_for, sequence_plan_for, with_sharded_loss
from tests.planted.tp_experts import ExpertParallel, MixtureLM, NamedExperts
from tests.planted.tp_loops import clip_globally, clip_mixed, clipped, parallel_cross_entropy
from tests.planted.tp_megatron import Megatron, RankDropout, SequenceParallel, by
from tests.planted.tp_model import FusedAttention, Shape, loss, tp_case
from tests.planted.tp_norms import BothWays, NormedQueries
from tests.planted.tp_overlap import Overlapping


@healthy
def megatron() -> TrainingCase:
    return tp_case("megatron", by(Megatron))


@healthy
def megatron_tied_uneven_vocabulary_without_bias() -> TrainingCase:
    return tp_case(
        "megatron_tied_uneven_vocabulary_without_bias", by(Megatron), tied=True, vocab=41, bias=False
    )


@healthy
def megatron_tied_in_double_precision() -> TrainingCase:
    return tp_case("megatron_tied_in_double_precision", by(Megatron), tied=True, dtype=torch.float64)


@healthy
def megatron_in_bfloat16() -> TrainingCase:
    return tp_case("megatron_in_bfloat16", by(Megatron), dtype=torch.bfloat16)


@healthy
def megatron_with_one_key_head_on_every_rank() -> TrainingCase:
    return tp_case("megatron_with_one_key_head_on_every_rank", by(Megatron), kv_heads=1)


@healthy
def megatron_with_grouped_heads() -> TrainingCase:
    return tp_case("megatron_with_grouped_heads", by(Megatron), kv_heads=2)


@healthy
def megatron_with_fused_query_key_value() -> TrainingCase:
    return tp_case("megatron_with_fused_query_key_value", by(Megatron), attention=FusedAttention)


@healthy
def megatron_sequence_parallel_uneven() -> TrainingCase:
    """15 tokens on two ranks."""
    return tp_case("megatron_sequence_parallel_uneven", by(SequenceParallel), tied=True)


class LocalLogits(Megatron):
    def gather(self, logits: Tensor, sizes: list[int]) -> Tensor:
        return logits


@healthy
def megatron_loss_over_sharded_vocabulary() -> TrainingCase:
    return tp_case(
        "megatron_loss_over_sharded_vocabulary",
        by(LocalLogits),
        vocab=41,
        fields={"loss": parallel_cross_entropy},
    )


@healthy
def megatron_clipped_by_the_global_norm() -> TrainingCase:
    return tp_case(
        "megatron_clipped_by_the_global_norm", by(Megatron), fields={"step": clipped(clip_globally)}
    )


@healthy
def megatron_with_dropout() -> TrainingCase:
    return tp_case("megatron_with_dropout", by(Megatron), dropout=0.1)


class SequenceDropout(SequenceParallel):
    """The residual stream is cut over ranks as well, and so are its random numbers."""

    def replicated_dropout(self, dropout: nn.Dropout) -> nn.Module:
        return RankDropout(dropout.p, 100 + self.rank)


@healthy
def megatron_sequence_parallel_with_dropout() -> TrainingCase:
    return tp_case("megatron_sequence_parallel_with_dropout", by(SequenceDropout), dropout=0.1)


@healthy
def megatron_sum_of_gradients_beside_the_weights_gradient() -> TrainingCase:
    return tp_case("megatron_sum_of_gradients_beside_the_weights_gradient", by(Overlapping))


def loss_under_autocast(model: Any, batch: dict[str, Tensor]) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        return loss(model, batch)


@healthy
def megatron_under_autocast() -> TrainingCase:
    return tp_case("megatron_under_autocast", by(Megatron), fields={"loss": loss_under_autocast})


@healthy
def dtensor_plan() -> TrainingCase:
    return tp_case("dtensor_plan", by_plan(plan_for))


@healthy
def dtensor_tied_again_uneven_vocabulary() -> TrainingCase:
    return tp_case("dtensor_tied_again_uneven_vocabulary", by_plan(plan_for), tied=True, vocab=41)


@healthy
def dtensor_in_double_precision() -> TrainingCase:
    return tp_case("dtensor_in_double_precision", by_plan(plan_for), dtype=torch.float64)


@healthy
def dtensor_sequence_parallel() -> TrainingCase:
    return tp_case("dtensor_sequence_parallel", by_plan(sequence_plan_for))


@healthy
def dtensor_loss_parallel() -> TrainingCase:
    return tp_case(
        "dtensor_loss_parallel",
        with_sharded_loss(by_plan(plan_for, gather_logits=False)),
    )


@healthy
def dtensor_clipped() -> TrainingCase:
    return tp_case("dtensor_clipped", by_plan(plan_for), fields={"step": clipped(clip_mixed)})


@healthy
def dtensor_with_grouped_heads_and_bfloat16() -> TrainingCase:
    return tp_case(
        "dtensor_with_grouped_heads_and_bfloat16", by_plan(plan_for), kv_heads=2, dtype=torch.bfloat16
    )


@healthy
def experts_divided_over_ranks() -> TrainingCase:
    fields = {"model": partial(MixtureLM, Shape())}
    return tp_case("experts_divided_over_ranks", by(ExpertParallel), fields=fields)


@healthy
def experts_of_other_names_on_each_rank() -> TrainingCase:
    fields = {"model": partial(MixtureLM, Shape())}
    return tp_case("experts_of_other_names_on_each_rank", by(NamedExperts), fields=fields)


@healthy
def norm_over_all_heads() -> TrainingCase:
    return tp_case("norm_over_all_heads", by(BothWays), attention=NormedQueries)
