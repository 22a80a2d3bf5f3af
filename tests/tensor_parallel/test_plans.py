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
FLOAT32_INSIDE = ("llama", "mistral", "qwen", "phi3", "olmo2")
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
    "gpt2": families.gpt2,
    "nanogpt": families.NanoGPT,
    "phi3": families.phi3,
    "olmo2": families.olmo2,
    "neox": families.neox,
    "bert": families.bert,
    "falcon": families.falcon,
    "stablelm, a norm for each head": families.stablelm,
}
# Variants of a family that another model here has shown.
VARIANTS = ("opt untied", "llama", "llama, eager attention", "mistral", "qwen2", "olmo2", "neox")
SOME = ("opt with an odd vocabulary", "opt with another embedding width", "gpt", "qwen3", "gpt2")
SEQUENCE = {"sequence_parallel": True}
LOSS = {"loss_parallel": True}
# Lengths that the ranks divide, that they do not, and that leave the last rank nothing.
SHAPES = {"even": (2, 8), "odd": (3, 7), "short": (1, 5)}

# What is tried: models, how they are made parallel, and the shape of the tokens.
Trial = tuple[tuple[str, ...], dict[str, bool], str]
TRIALS: dict[int, list[Trial]] = {
    2: [
        (tuple(name for name in MODELS if name not in VARIANTS), {}, "even"),
        (SOME, SEQUENCE, "odd"),
        (SOME, LOSS, "odd"),
    ],
    4: [
        (("opt with an odd vocabulary", "llama", "llama, one key-value head", "qwen3", "gpt2"), {}, "even"),
        (("opt with an odd vocabulary", "llama, one key-value head"), SEQUENCE, "short"),
        (("opt with an odd vocabulary",), SEQUENCE | LOSS, "odd"),
    ],
}


def all_errors(trials: list[Trial]) -> dict[str, dict[str, float]]:
    from pytest_gputrain import tensor_parallel
    from tests.tensor_parallel import golden

    make: Any = tensor_parallel.parallelize
    return {
        f"{name} {how} {shape}": golden.errors(MODELS[name], partial(make, **how), SHAPES[shape])
        for names, how, shape in trials
        for name in names
    }


def tolerance(name: str) -> float:
    return ROUNDED if name.startswith(FLOAT32_INSIDE) else EXACT


@pytest.mark.parametrize("world_size", [2, 4])
def test_every_family_is_as_one_process(world_size: int) -> None:
    judge(TRIALS[world_size], world_size)


@pytest.mark.nightly
def test_variants_of_a_family_are_as_one_process() -> None:
    judge([(VARIANTS, {}, "even"), (("mistral", "qwen2"), SEQUENCE, "odd")], 2)


def own_plan(model: Any, mesh: Any) -> Any:
    from pytest_gputrain import TrainingCase
    from pytest_gputrain.tensor_parallel.apply import apply

    # The mapping of a case, as transformers gives it.
    case = TrainingCase(
        name="own", model=families.qwen3, batch=max, loss=max, parallelize=dict(model.tp_plan)
    )
    return apply(case, model, mesh)


def test_the_plan_of_transformers_itself() -> None:
    def errors() -> dict[str, float]:
        from tests.tensor_parallel import golden

        return golden.errors(families.qwen3, own_plan)

    for found in launch(errors, world_size=2).values:
        assert len(found) > 10
        assert max(found.values()) <= ROUNDED


def judge(trials: list[Trial], world_size: int) -> None:
    for of_a_rank in launch(all_errors, trials, world_size=world_size).values:
        assert len(of_a_rank) == sum(len(names) for names, _, _ in trials)
        wrong = {
            (name, what): error
            for name, found in of_a_rank.items()
            for what, error in found.items()
            if not error <= tolerance(name)
        }
        assert not wrong
        assert all(len(found) > 10 for found in of_a_rank.values())
