"""The three-branch attention itself, written with dense masks: for reading and testing, not for speed.

compressed: attention over one learned summary a block of earlier tokens.
selected:   attention within the blocks whose summaries scored highest, and the token's own block.
sliding:    attention within a window that ends at the token.
Each has keys and values of its own; a sigmoid gate a token, head and branch mixes them.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pytest_gputrain.reference.sparse_attention import BRANCHES

if TYPE_CHECKING:
    from pytest_gputrain.reference.sparse_attention import SparseConfig


class SparseAttention(nn.Module):
    """(batch, length, width) -> the same shape, causal."""

    branches = BRANCHES

    def __init__(self, config: SparseConfig) -> None:
        super().__init__()
        self.config = config
        self.head_width = config.width // config.num_heads
        self.query = nn.Linear(config.width, config.width, bias=False)
        self.key_value = nn.ModuleDict({b: nn.Linear(config.width, 2 * config.width) for b in BRANCHES})
        self.summarize = nn.Linear(config.block_size, 1)
        self.gate = nn.Linear(config.width, len(BRANCHES) * config.num_heads)
        self.proj = nn.Linear(config.width, config.width, bias=False)

    def force_branch(self, name: str) -> None:
        """Use this branch alone, with a gate of one."""
        gates = {branch: float(branch == name) for branch in BRANCHES}
        self.config = replace(self.config, **gates)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        query = self._heads(self.query(x))
        gates = self.gate(x).sigmoid().unflatten(-1, (len(BRANCHES), self.config.num_heads, 1))
        scores = self._block_scores(x, query)
        mixed = torch.zeros_like(query)
        for index, branch in enumerate(BRANCHES):
            fixed = self.config.gate(branch)
            if fixed == 0.0:
                continue
            gate = gates[:, :, index].transpose(1, 2) if fixed is None else fixed
            mixed = mixed + gate * self._attend(branch, x, query, scores)
        out: Tensor = self.proj(mixed.transpose(1, 2).flatten(2))
        return out

    def _heads(self, x: Tensor) -> Tensor:
        heads: Tensor = x.unflatten(-1, (self.config.num_heads, self.head_width))
        return heads.transpose(1, 2)

    def _keys_values(self, branch: str, x: Tensor) -> tuple[Tensor, Tensor]:
        key, value = self.key_value[branch](x).chunk(2, dim=-1)
        return self._heads(key), self._heads(value)

    def _summary(self, x: Tensor) -> Tensor:
        """(batch, heads, length, width) -> (batch, heads, blocks, width)."""
        blocks = x.unflatten(2, (-1, self.config.block_size))
        out: Tensor = self.summarize(blocks.transpose(-1, -2)).squeeze(-1)
        return out

    def _block_scores(self, x: Tensor, query: Tensor) -> Tensor:
        """How much each token cares for each block, (batch, heads, length, blocks)."""
        key = self._summary(self._keys_values("compressed", x)[0])
        scores: Tensor = query @ key.transpose(-1, -2) / self.head_width**0.5
        return scores

    def _attend(self, branch: str, x: Tensor, query: Tensor, scores: Tensor) -> Tensor:
        key, value = self._keys_values(branch, x)
        if branch == "compressed":
            return self._softmax(scores, self._finished(x.size(1), x.device)) @ self._summary(value)
        mask = self._selected(scores) if branch == "selected" else self._window(x.size(1), x.device)
        return self._softmax(query @ key.transpose(-1, -2) / self.head_width**0.5, mask) @ value

    def _softmax(self, scores: Tensor, mask: Tensor) -> Tensor:
        # A token in the first block has no finished block to look at: its row is all zero, not NaN.
        weights = scores.masked_fill(~mask, -1e9).softmax(-1)
        return weights * mask

    def _finished(self, length: int, device: torch.device) -> Tensor:
        """(length, blocks): the blocks that end before the token."""
        token = torch.arange(length, device=device)[:, None]
        block = torch.arange(length // self.config.block_size, device=device)[None]
        return (block + 1) * self.config.block_size <= token

    def _window(self, length: int, device: torch.device) -> Tensor:
        token = torch.arange(length, device=device)
        distance = token[:, None] - token[None]
        return (distance >= 0) & (distance < self.config.window)

    def _selected(self, scores: Tensor) -> Tensor:
        """(batch, heads, length, length): tokens of the chosen blocks and of the own one, causal."""
        length, size = scores.size(2), self.config.block_size
        finished = self._finished(length, scores.device)
        best = scores.detach().masked_fill(~finished, -torch.inf).topk(self.config.num_selected, dim=-1)
        chosen = torch.zeros_like(scores, dtype=torch.bool).scatter(-1, best.indices, True) & finished
        token = torch.arange(length, device=scores.device)
        own = F.one_hot(token // size, length // size).bool()
        causal = token[:, None] >= token[None]
        return (chosen | own).repeat_interleave(size, dim=-1) & causal


class Block(nn.Module):
    def __init__(self, config: SparseConfig) -> None:
        super().__init__()
        self.attention = SparseAttention(config)
        self.attention_norm = nn.LayerNorm(config.width)
        self.mlp_norm = nn.LayerNorm(config.width)
        self.mlp = nn.Sequential(
            nn.Linear(config.width, 4 * config.width), nn.GELU(), nn.Linear(4 * config.width, config.width)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.attention_norm(x))
        out: Tensor = x + self.mlp(self.mlp_norm(x))
        return out


class SparseTransformer(nn.Module):
    """Tokens (batch, length) int64 -> logits (batch, length, vocab_size)."""

    def __init__(self, config: SparseConfig) -> None:
        super().__init__()
        self.embedding = nn.Embedding(config.vocab_size, config.width)
        self.position = nn.Embedding(config.sequence_length, config.width)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.depth))
        self.head = nn.Linear(config.width, config.vocab_size, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens) + self.position.weight[: tokens.size(1)]
        for block in self.blocks:
            x = block(x)
        logits: Tensor = self.head(x)
        return logits
