"""The closed formula: exact in its static part, called an estimate, silent on what it does not know."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from pytest_gputrain import TrainingCase
from pytest_gputrain.memory.estimate import estimate_memory
from pytest_gputrain.reference.gpt import gpt_case
from pytest_gputrain.reference.opt import case as opt

plain = TrainingCase(
    name="plain",
    model=lambda: nn.Linear(100, 100),
    batch=lambda n, d: torch.randn(n, 100),
    loss=lambda m, b: m(b).sum(),
)
SIZE = 4 * (100 * 100 + 100)


@pytest.mark.parametrize(
    ("states", "optimizer"),
    [
        (2, lambda m: torch.optim.AdamW(m.parameters())),
        (3, lambda m: torch.optim.Adam(m.parameters(), amsgrad=True)),
        (0, lambda m: torch.optim.SGD(m.parameters(), lr=0.1)),
        (1, lambda m: torch.optim.SGD(m.parameters(), lr=0.1, momentum=0.9)),
        (3, lambda m: torch.optim.RMSprop(m.parameters(), momentum=0.9, centered=True)),
        (1, lambda m: torch.optim.Adagrad(m.parameters())),
    ],
)
def test_the_static_part_is_counted(states: int, optimizer: object) -> None:
    estimate = estimate_memory(replace(plain, optimizer=optimizer), 1, 1)
    assert (estimate.parameters, estimate.gradients, estimate.optimizer_state) == (SIZE, SIZE, states * SIZE)
    assert estimate.activations is None and estimate.total_bytes == (2 + states) * SIZE


def test_it_calls_itself_an_estimate() -> None:
    assert str(estimate_memory(plain, 4, 1)) == (
        "estimate: 157.8 KiB + activations (parameters 39.5 KiB, gradients 39.5 KiB, "
        "optimizer state 78.9 KiB, activations unknown: "
        "no width and depth to be read from the model)"
    )


def test_activations_of_a_transformer_grow_with_tokens() -> None:
    short, long = (estimate_memory(opt, 8, length).activations or 0 for length in (64, 128))
    assert long == 2 * short > 0
    assert (estimate_memory(opt, 8, 64, checkpointing=True).activations or 0) < short


def test_depth_and_width_are_read_from_layers_without_a_config() -> None:
    estimate = estimate_memory(gpt_case(3, width=64, sequence_length=32, vocab_size=100), 8)
    assert estimate.why == "3 layers of 64, vocabulary 100, 32 tokens"
    assert (estimate.activations or 0) > 0


def test_bad_input() -> None:
    with pytest.raises(ValueError, match="sequence_length is -5; give a whole number of 1 or more"):
        estimate_memory(opt, 1, -5)
