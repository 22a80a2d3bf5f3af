"""What is said of shapes that do not fit."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from pytest_gputrain.tensor_parallel.golden_likely import indivisible, tell


class Attention(nn.Module):
    def __init__(self, heads: int) -> None:
        super().__init__()
        self.num_heads = heads

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.view(1, self.num_heads, 3)


def told(x: torch.Tensor, world_size: int, config: Any = None) -> str:
    model: Any = nn.Sequential(Attention(8))
    model.config = config
    try:
        model(x)
    except RuntimeError as error:
        tell(error, model, world_size)
        return str(error)
    raise AssertionError("the shape fits")


def test_heads_that_the_ranks_do_not_divide() -> None:
    config = SimpleNamespace(num_attention_heads=8, num_key_value_heads=8)
    assert told(torch.zeros(7), 3, config) == (
        "shape '[1, 8, 3]' is invalid for input of size 7; likely: num_attention_heads = 8 is not divisible "
        "by 3 ranks (8 = 2 x 3 + 2)"
    )


def test_heads_that_were_not_divided() -> None:
    assert told(torch.zeros(12), 2) == (
        "shape '[1, 8, 3]' is invalid for input of size 12; likely: Attention has num_heads = 8; where its "
        "projections are cut over 2 ranks it has to be told 8 / 2 = 4"
    )


def test_a_modules_own_number_of_heads_is_told_in_the_first_line() -> None:
    model = nn.Sequential(Attention(8))
    likely = "0 has num_heads = 8, not divisible by 3 ranks (8 = 2 x 3 + 2)"
    assert indivisible(model, 3) == likely
    assert indivisible(model, 4) is None
    error = RuntimeError("a and b must have same reduction dim\n\nSharding propagation failed")
    tell(error, model, 3)
    assert str(error) == (
        f"a and b must have same reduction dim; likely: {likely}\n\nSharding propagation failed"
    )
