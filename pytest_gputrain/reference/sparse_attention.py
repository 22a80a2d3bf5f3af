"""A transformer with three-branch sparse attention, as a `TrainingCase`: compressed, selected, sliding.

Each branch can be left to its learned gate, forced or disabled, so that a test can say which branch breaks.
``case`` is two layers, 32 wide. Importing this module imports no torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from pytest_gputrain.case import CaseError, TrainingCase

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from pytest_gputrain.reference.sparse_attention_model import SparseTransformer

BRANCHES = ("compressed", "selected", "sliding")


@dataclass(frozen=True)
class SparseConfig:
    """Lengths in tokens; sequence_length is a multiple of block_size.

    compressed, selected, sliding: the branch's gate. None: learned; a number: fixed, so 1.0 forces the branch
    and 0.0 disables it (it is not computed, and its parameters get no gradient).
    """

    depth: int = 2
    width: int = 32
    num_heads: int = 2
    vocab_size: int = 64
    sequence_length: int = 32
    block_size: int = 4
    num_selected: int = 2
    window: int = 6
    compressed: float | None = None
    selected: float | None = None
    sliding: float | None = None

    def __post_init__(self) -> None:
        if self.sequence_length % self.block_size:
            raise CaseError(
                f"sequence_length {self.sequence_length} is not a multiple of block_size {self.block_size} "
                f"({self.sequence_length % self.block_size} over); give one that is"
            )
        if self.width % self.num_heads:
            raise CaseError(f"width {self.width} is not a multiple of num_heads {self.num_heads}")

    def gate(self, branch: str) -> float | None:
        """The fixed gate of a branch, None where it is learned."""
        value: float | None = getattr(self, branch)
        return value


def build(config: SparseConfig) -> SparseTransformer:
    from pytest_gputrain.reference.sparse_attention_model import SparseTransformer

    return SparseTransformer(config)


def draw(config: SparseConfig, batch_size: int, device: torch.device | str) -> dict[str, Tensor]:
    """``inputs`` and ``targets``, each (batch_size, sequence_length), int64, from the torch generator."""
    import torch

    tokens = torch.randint(config.vocab_size, (batch_size, config.sequence_length + 1))
    return {"inputs": tokens[:, :-1].to(device), "targets": tokens[:, 1:].to(device)}


def loss(model: Any, batch: dict[str, Tensor]) -> Tensor:
    """Mean cross entropy over all tokens, a scalar."""
    import torch.nn.functional as F

    return F.cross_entropy(model(batch["inputs"]).flatten(0, 1), batch["targets"].flatten())


def sparse_attention_case(*, name: str = "sparse-attention", **config: Any) -> TrainingCase:
    """The fields of `SparseConfig` by keyword. Raises CaseError when the lengths do not fit."""
    chosen = SparseConfig(**config)
    return TrainingCase(name=name, model=partial(build, chosen), batch=partial(draw, chosen), loss=loss)


case = sparse_attention_case()
