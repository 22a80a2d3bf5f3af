"""Healthy programs whose models other people wrote: Hugging Face architectures, tiny, weights drawn."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from pytest_gputrain.case import TrainingCase
from pytest_gputrain.reference import gpt, opt
from tests.planted.plant import healthy

VOCABULARY, LENGTH = 64, 16

SHAPES: dict[str, dict[str, Any]] = {
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 32, "vocab_size": VOCABULARY},
    "llama": {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": VOCABULARY,
        "max_position_embeddings": 32,
    },
    "bert": {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "vocab_size": VOCABULARY,
        "max_position_embeddings": 32,
    },
}


def build(kind: str) -> Any:
    import transformers

    config = transformers.AutoConfig.for_model(kind, **SHAPES[kind])
    family = transformers.AutoModelForMaskedLM if kind == "bert" else transformers.AutoModelForCausalLM
    return family.from_config(config)


def draw(batch_size: int, device: Any) -> Any:
    from transformers import BatchEncoding

    tokens = torch.randint(VOCABULARY, (batch_size, LENGTH)).to(device)
    mask = torch.ones_like(tokens)
    return BatchEncoding({"input_ids": tokens, "attention_mask": mask, "labels": tokens.clone()})


def loss(model: Any, batch: Any) -> Tensor:
    value: Tensor = model(**batch).loss
    return value


def checkpointing(model: Any, layers: slice | None) -> None:
    model.gradient_checkpointing_enable()


def hugging_face(kind: str) -> TrainingCase:
    return TrainingCase(
        name=kind, model=partial(build, kind), batch=draw, loss=loss, set_checkpointing=checkpointing
    )


@healthy
def gpt2() -> TrainingCase:
    return hugging_face("gpt2")


@healthy
def llama() -> TrainingCase:
    return hugging_face("llama")


@healthy
def bert() -> TrainingCase:
    return hugging_face("bert")


@healthy
def reference_opt() -> TrainingCase:
    return opt.case


@healthy
def reference_gpt() -> TrainingCase:
    return gpt.gpt_case(dropout=0.1, name="gpt-dropout")
