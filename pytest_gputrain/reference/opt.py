"""Hugging Face OPT built from its configuration, weights drawn, nothing downloaded, as a `TrainingCase`.

``case`` is tiny; ``opt_case("opt-125m")`` and ``case_125m`` have the published model's full shape.
Needs ``transformers`` (the extra ``[opt]``), imported when the model is built.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

from pytest_gputrain.case import CaseError, TrainingCase

if TYPE_CHECKING:
    import torch
    from torch import Tensor

SEQUENCE_LENGTH = 32

SIZES: dict[str, dict[str, Any]] = {
    "opt-tiny": {
        "vocab_size": 256,
        "hidden_size": 32,
        "word_embed_proj_dim": 32,
        "ffn_dim": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 64,
    },
    # The published facebook/opt-125m, which is what OPTConfig() gives.
    "opt-125m": {},
    "opt-125m-50257": {"vocab_size": 50257},
}


def build(size: str) -> Any:
    try:
        from transformers import OPTConfig, OPTForCausalLM
    except ImportError as error:
        raise ImportError(
            'the OPT reference needs transformers; install it with: pip install "pytest-gputrain[opt]"'
        ) from error
    config = OPTConfig(**SIZES[size])
    return OPTForCausalLM(config).train()


def draw(size: str, batch_size: int, device: torch.device | str) -> dict[str, Tensor]:
    """``input_ids`` and ``labels``, each (batch_size, 32), int64, from the torch generator."""
    import torch

    vocab_size = SIZES[size].get("vocab_size", 50272)
    tokens = torch.randint(3, vocab_size, (batch_size, SEQUENCE_LENGTH)).to(device)
    return {"input_ids": tokens, "labels": tokens.clone()}


def loss(model: Any, batch: dict[str, Tensor]) -> Tensor:
    """The model's own mean next-token cross entropy, a scalar."""
    value: Tensor = model(**batch).loss
    return value


def set_checkpointing(model: Any, layers: slice | None) -> None:
    """Recompute the decoder's layers in backward. transformers knows all layers or none, so a part is all."""
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})


def opt_case(size: str = "opt-tiny", *, name: str | None = None) -> TrainingCase:
    """OPT of a named size. Raises CaseError when there is no such size."""
    if size not in SIZES:
        raise CaseError(f"no OPT of size {size!r}; give one of {', '.join(SIZES)}")
    return TrainingCase(
        name=name or ("opt" if size == "opt-tiny" else size),
        model=partial(build, size),
        batch=partial(draw, size),
        loss=loss,
        set_checkpointing=set_checkpointing,
        parallelize="pytest_gputrain.tensor_parallel:parallelize",
    )


case = opt_case()
case_125m = opt_case("opt-125m")
