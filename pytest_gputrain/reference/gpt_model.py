"""The GPT itself: rotary positions, norms without parameters, relu-squared MLP, untied head.

Output projections and the head start at zero, as in nanochat: their inputs get gradients that are exactly
zero at step 1. That is a property of healthy models, and the checks have to live with it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

if TYPE_CHECKING:
    from pytest_gputrain.reference.gpt import GPTConfig

ROTARY_BASE = 10000.0


def norm(x: Tensor) -> Tensor:
    """Root-mean-square norm over the last dimension, without parameters."""
    return F.rms_norm(x, (x.size(-1),))


def rotary_angles(length: int, width: int) -> tuple[Tensor, Tensor]:
    """Cosine and sine, each (1, 1, length, width / 2)."""
    frequency = ROTARY_BASE ** (-torch.arange(0, width, 2, dtype=torch.float32) / width)
    angle = torch.outer(torch.arange(length, dtype=torch.float32), frequency)
    return angle.cos()[None, None], angle.sin()[None, None]


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn the two halves of each head (batch, heads, length, width) by their position's angle."""
    length = x.size(2)
    cos, sin = cos[:, :, :length].to(x.dtype), sin[:, :, :length].to(x.dtype)
    left, right = x.chunk(2, dim=-1)
    return torch.cat([left * cos + right * sin, right * cos - left * sin], dim=-1)


class Attention(nn.Module):
    """Causal self-attention with normalised queries and keys."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        width = config.num_channels
        self.num_heads = config.num_heads
        self.to_query = nn.Linear(width, width, bias=False)
        self.to_key = nn.Linear(width, width, bias=False)
        self.to_value = nn.Linear(width, width, bias=False)
        self.proj = nn.Linear(width, width, bias=False)
        nn.init.zeros_(self.proj.weight)

    def heads(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        return x.view(batch, length, self.num_heads, width // self.num_heads).transpose(1, 2)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        query = norm(rotate(self.heads(self.to_query(x)), cos, sin))
        key = norm(rotate(self.heads(self.to_key(x)), cos, sin))
        mixed = F.scaled_dot_product_attention(query, key, self.heads(self.to_value(x)), is_causal=True)
        out: Tensor = self.proj(mixed.transpose(1, 2).flatten(2))
        return out


class MLP(nn.Module):
    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.fc = nn.Linear(config.num_channels, 4 * config.num_channels, bias=False)
        self.proj = nn.Linear(4 * config.num_channels, config.num_channels, bias=False)
        nn.init.zeros_(self.proj.weight)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.proj(F.relu(self.fc(x)).square())
        return out


class Block(nn.Module):
    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.attention = Attention(config)
        self.mlp = MLP(config)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x = x + self.dropout(self.attention(norm(x), cos, sin))
        out: Tensor = x + self.dropout(self.mlp(norm(x)))
        return out


class GPT(nn.Module):
    """Tokens (batch, length) int64 -> logits (batch, length, vocab_size)."""

    cos: Tensor
    sin: Tensor

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.embedding = nn.Embedding(config.vocab_size, config.num_channels)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.depth))
        self.head = nn.Linear(config.num_channels, config.vocab_size, bias=False)
        nn.init.zeros_(self.head.weight)
        cos, sin = rotary_angles(config.sequence_length, config.num_channels // config.num_heads)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)
        self._checkpointed: frozenset[int] = frozenset()

    def set_checkpointing(self, layers: slice | None) -> None:
        """Recompute these blocks in backward (None: all)."""
        chosen = range(len(self.blocks))[layers or slice(None)]
        self._checkpointed = frozenset(chosen)

    def forward(self, tokens: Tensor) -> Tensor:
        x = norm(self.embedding(tokens))
        for index, block in enumerate(self.blocks):
            if index in self._checkpointed and self.training:
                x = checkpoint(block, x, self.cos, self.sin, use_reentrant=False)
            else:
                x = block(x, self.cos, self.sin)
        logits: Tensor = self.head(norm(x))
        return logits
