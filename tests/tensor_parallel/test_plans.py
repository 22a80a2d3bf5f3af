"""Plans by module names, on real gloo ranks: logits and every gradient as in one process, in float64."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest

from pytest_gputrain import launch
from tests.tensor_parallel import families

# What float64 sums in another order may differ by.
EXACT = 1e-10
# The RMSNorm of these families computes in float32, whatever the model's precision.
FLOAT32_INSIDE = ("llama", "mistral", "qwen")
ROUNDED = 1e-6

MODELS: dict[str, Callable[[], Any]] = {
    "opt": families.opt,
    "opt with an odd vocabulary": partial(families.opt, vocab_size=251),
    "opt untied": partial(families.opt, tie_word_embeddings=False),
    "opt without bias, norms after": partial(families.opt, enable_bias=False, do_layer_norm_before=False),
    "opt with another embedding width": partial(families.opt, word_embed_proj_dim=16),
    "gpt": families.gpt,
    "llama": families.llama,
    "llama, one key-value head": partial(
        families.llama, num_key_value_heads=1, tie_word_embeddings=True, attention_bias=True
    ),
    "llama, eager attention": partial(families.llama, attn_implementation="eager"),
    "mistral": families.mistral,
    "qwen2": families.qwen2,
    "qwen3": families.qwen3,
}


def all_errors(models: dict[str, Callable[[], Any]]) -> dict[str, dict[str, float]]:
    from pytest_gputrain.tensor_parallel import parallelize
    from tests.tensor_parallel import golden

    return {name: golden.errors(build, parallelize) for name, build in models.items()}


def tolerance(name: str) -> float:
    return ROUNDED if name.startswith(FLOAT32_INSIDE) else EXACT


@pytest.mark.parametrize("world_size", [2, 4])
def test_every_family_is_as_one_process(world_size: int) -> None:
    for of_a_rank in launch(all_errors, MODELS, world_size=world_size).values:
        assert of_a_rank.keys() == MODELS.keys()
        wrong = {
            (name, what): error
            for name, found in of_a_rank.items()
            for what, error in found.items()
            if not error <= tolerance(name)
        }
        assert not wrong
        assert all(len(found) > 10 for found in of_a_rank.values())
