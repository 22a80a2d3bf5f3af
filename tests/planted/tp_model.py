"""The tiny language model that the tensor-parallel programs are made from: one process, plain modules."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pytest_gputrain.case import TrainingCase
from tests.planted.plant import broken

CHECKS = ("tp_forward", "tp_backward", "tp_optimizers", "tp_memory", "tp_training")


@dataclass(frozen=True)
class Shape:
    """vocab is odd in some programs, so that shards are uneven; kv_heads below heads is grouped attention."""

    vocab: int = 40
    width: int = 16
    heads: int = 4
    kv_heads: int = 4
    hidden: int = 32
    layers: int = 2
    length: int = 32
    bias: bool = True
    tied: bool = False
    zero_bias: bool = False
    dropout: float = 0.0
    dtype: torch.dtype = torch.float32


class Attention(nn.Module):
    # Any, here and below: a parallel module takes the place of each.
    query: Any
    key: Any
    value: Any
    out: Any
    qkv: Any

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.head_width = shape.heads, shape.kv_heads, shape.width // shape.heads
        kv_width = self.kv_heads * self.head_width
        self.query = nn.Linear(shape.width, shape.width, bias=shape.bias)
        self.key = nn.Linear(shape.width, kv_width, bias=shape.bias)
        self.value = nn.Linear(shape.width, kv_width, bias=shape.bias)
        self.out = nn.Linear(shape.width, shape.width, bias=shape.bias)

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self.query(x), self.key(x), self.value(x)

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.project(x)
        batch, length = query.shape[:2]
        # -1, as many programs write it: with heads that were not divided it fits all the same.
        q = query.view(batch, length, self.heads, -1).transpose(1, 2)
        k = key.view(batch, length, self.kv_heads, -1).transpose(1, 2)
        v = value.view(batch, length, self.kv_heads, -1).transpose(1, 2)
        mixed = F.scaled_dot_product_attention(
            q, k, v, is_causal=True, enable_gqa=self.heads != self.kv_heads
        )
        out: Tensor = self.out(mixed.transpose(1, 2).flatten(2))
        return out


class FusedAttention(Attention):
    """Query, key and value by one projection, as in GPT-2."""

    def __init__(self, shape: Shape) -> None:
        super().__init__(shape)
        del self.query, self.key, self.value
        self.qkv = nn.Linear(shape.width, 3 * shape.width, bias=shape.bias)

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        query, key, value = self.qkv(x).chunk(3, dim=-1)
        return query, key, value


class MLP(nn.Module):
    up: Any
    down: Any
    dropout: Any

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.up = nn.Linear(shape.width, shape.hidden, bias=shape.bias)
        self.down = nn.Linear(shape.hidden, shape.width, bias=shape.bias)
        self.dropout = nn.Dropout(shape.dropout)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.down(self.dropout(F.gelu(self.up(x))))
        return out


class Block(nn.Module):
    norm1: Any
    norm2: Any
    dropout: Any
    mlp: Any

    def __init__(self, shape: Shape, attention: type[Attention]) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(shape.width), nn.LayerNorm(shape.width)
        self.attention, self.mlp = attention(shape), MLP(shape)
        self.dropout = nn.Dropout(shape.dropout)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.dropout(self.attention(self.norm1(x)))
        out: Tensor = x + self.dropout(self.mlp(self.norm2(x)))
        return out


class LM(nn.Module):
    """Tokens (batch, length) int64 -> logits (batch, length, vocab)."""

    embed: Any
    positions: Any
    blocks: Any
    norm: Any
    head: Any

    def __init__(self, shape: Shape, attention: type[Attention] = Attention) -> None:
        super().__init__()
        self.shape = shape
        self.embed = nn.Embedding(shape.vocab, shape.width)
        self.positions = nn.Embedding(shape.length, shape.width)
        self.blocks = nn.ModuleList(Block(shape, attention) for _ in range(shape.layers))
        self.norm = nn.LayerNorm(shape.width)
        self.head = nn.Linear(shape.width, shape.vocab, bias=shape.bias and not shape.tied)
        if shape.tied:
            self.head.weight = self.embed.weight
        if shape.zero_bias:
            for name, parameter in self.named_parameters():
                if name.endswith("bias"):
                    nn.init.zeros_(parameter)
        self.to(shape.dtype)

    def forward(self, tokens: Tensor) -> Tensor:
        places = torch.arange(tokens.size(1), device=tokens.device)
        x = self.embed(tokens) + self.positions(places)
        for block in self.blocks:
            x = block(x)
        logits: Tensor = self.head(self.norm(x))
        return logits


def draw(shape: Shape, batch_size: int, device: Any) -> dict[str, Tensor]:
    tokens = torch.randint(shape.vocab, (batch_size, 13))
    return {"x": tokens[:, :-1].to(device), "y": tokens[:, 1:].to(device)}


def loss(model: Any, batch: dict[str, Tensor]) -> Tensor:
    logits = model(batch["x"]).flatten(0, 1)
    return F.cross_entropy(logits.float() if logits.dtype == torch.bfloat16 else logits, batch["y"].flatten())


def tp_case(
    name: str,
    parallelize: Any,
    *,
    attention: type[Attention] = Attention,
    fields: dict[str, Any] | None = None,
    **shape: Any,
) -> TrainingCase:
    """The tiny model made tensor parallel by ``parallelize(model, mesh)``; shape: fields of `Shape`."""
    chosen = Shape(**shape)
    given = {"model": partial(LM, chosen, attention), "batch": partial(draw, chosen), "loss": loss}
    return TrainingCase(**{"name": name, "parallelize": parallelize, **given, **(fields or {})})


def broken_tp(
    check: str, fragment: str, *, may_fail: tuple[str, ...] = ()
) -> Callable[[Callable[[], TrainingCase]], Callable[[], TrainingCase]]:
    """Register a program that this check fails with that fragment; checks of tp may, too."""
    return broken({check: fragment}, may_fail=(*CHECKS, *may_fail))
