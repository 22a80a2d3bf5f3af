"""Tensor parallelism that goes wrong at a vocabulary that is cut over the ranks."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pytest_gputrain.case import TrainingCase
from tests.planted.tp_loops import lossy_cross_entropy
from tests.planted.tp_megatron import Megatron, VocabEmbedding, all_reduce, by
from tests.planted.tp_model import LM, Shape, broken_tp, tp_case


class PaddingInEveryPart(VocabEmbedding):
    """The padding token's number is taken for a row of every part."""

    def lookup(self, tokens: Tensor) -> Tensor:
        elsewhere = (tokens < self.start) | (tokens >= self.start + self.size)
        rows = F.embedding((tokens - self.start).masked_fill(elsewhere, 0), self.weight, padding_idx=1)
        return rows.masked_fill(elsewhere[..., None], 0.0)


class PaddedEmbedding(Megatron):
    def embedding(self, embedding: nn.Embedding) -> nn.Module:
        return PaddingInEveryPart(self, embedding)


class PaddedLM(LM):
    def __init__(self, shape: Shape) -> None:
        super().__init__(shape)
        self.embed.padding_idx = 1


def few_tokens(batch_size: int, device: Any) -> dict[str, Tensor]:
    """Of the many that there are: as with any real vocabulary."""
    tokens = torch.randint(2, 40, (batch_size, 13))
    return {"x": tokens[:, :-1].to(device), "y": tokens[:, 1:].to(device)}


@broken_tp("tp_backward", "for tokens 251, 250, 249, 499, 0, at the borders of the ranks' parts of embed")
def padding_token_in_every_part() -> TrainingCase:
    """Token 251 is never trained."""
    fields = {"model": partial(PaddedLM, Shape(vocab=500)), "batch": few_tokens}
    return tp_case("padding_token_in_every_part", by(PaddedEmbedding), fields=fields)


class FirstTokenLost(VocabEmbedding):
    def lookup(self, tokens: Tensor) -> Tensor:
        elsewhere = (tokens <= self.start) | (tokens >= self.start + self.size)
        if self.how.rank == 0:
            elsewhere = tokens >= self.size
        rows = F.embedding((tokens - self.start).masked_fill(elsewhere, 0), self.weight)
        return rows.masked_fill(elsewhere[..., None], 0.0)


class OffByOne(Megatron):
    def embedding(self, embedding: nn.Embedding) -> nn.Module:
        return FirstTokenLost(self, embedding)


@broken_tp("tp_backward", "first layer to depart, going forward: embed")
def first_token_of_a_part_lost() -> TrainingCase:
    return tp_case("first_token_of_a_part_lost", by(OffByOne), vocab=500, fields={"batch": few_tokens})


class LocalLogits(Megatron):
    def gather(self, logits: Tensor, sizes: list[int]) -> Tensor:
        return logits


@broken_tp("tp_forward", "at the borders of the ranks' parts of embed, unlike others: the loss for an input")
def first_target_of_a_part_lost() -> TrainingCase:
    """No batch has it."""
    fields = {"batch": few_tokens, "loss": lossy_cross_entropy}
    return tp_case("first_target_of_a_part_lost", by(LocalLogits), vocab=500, fields=fields)


class TiedEmbeddingSummed(Megatron):
    """Its rows are cut over the ranks, and their gradients added up: each row with another rank's."""

    def tie(self, model: LM) -> None:
        super().tie(model)
        model.embed.weight.register_hook(lambda grad: all_reduce(grad, self.group))


@broken_tp(
    "tp_backward", "embed (gradient is the sum of all ranks' parts: what is cut over ranks is not to be"
)
def gradients_of_parts_summed() -> TrainingCase:
    return tp_case("gradients_of_parts_summed", by(TiedEmbeddingSummed), tied=True)
