"""A small GPT in the manner of nanochat, as a `TrainingCase`: depth -> width 64 x depth.

``case`` is two layers, 128 wide. Importing this module imports no torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from pytest_gputrain.case import TrainingCase

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from pytest_gputrain.reference.gpt_model import GPT

WIDTH_PER_LAYER = 64
HEAD_WIDTH = 32


@dataclass(frozen=True)
class GPTConfig:
    """depth: layers; width: channels (0 means 64 x depth); lengths in tokens."""

    depth: int = 2
    width: int = 0
    vocab_size: int = 256
    sequence_length: int = 32
    dropout: float = 0.0

    @property
    def num_channels(self) -> int:
        return self.width or WIDTH_PER_LAYER * self.depth

    @property
    def num_heads(self) -> int:
        return max(1, self.num_channels // HEAD_WIDTH)


def build(config: GPTConfig) -> GPT:
    from pytest_gputrain.reference.gpt_model import GPT

    return GPT(config)


def draw(config: GPTConfig, batch_size: int, device: torch.device | str) -> dict[str, Tensor]:
    """``inputs`` and ``targets``, each (batch_size, sequence_length), int64, from the torch generator."""
    import torch

    tokens = torch.randint(config.vocab_size, (batch_size, config.sequence_length + 1))
    return {"inputs": tokens[:, :-1].to(device), "targets": tokens[:, 1:].to(device)}


def loss(model: Any, batch: dict[str, Tensor]) -> Tensor:
    """Mean cross entropy over all tokens, a scalar."""
    import torch.nn.functional as F

    logits = model(batch["inputs"])
    return F.cross_entropy(logits.flatten(0, 1).float(), batch["targets"].flatten())


def set_checkpointing(model: Any, layers: slice | None) -> None:
    """Recompute these blocks' activations in backward; None means all of them."""
    model.set_checkpointing(layers)


def gpt_case(depth: int = 2, *, name: str | None = None, **config: Any) -> TrainingCase:
    """A GPT of ``depth`` layers; the other fields of `GPTConfig` by keyword."""
    chosen = GPTConfig(depth=depth, **config)
    return TrainingCase(
        name=name or ("gpt" if depth == GPTConfig.depth else f"gpt-d{depth}"),
        model=partial(build, chosen),
        batch=partial(draw, chosen),
        loss=loss,
        set_checkpointing=set_checkpointing,
        parallelize="pytest_gputrain.tensor_parallel:parallelize",
    )


case = gpt_case()
