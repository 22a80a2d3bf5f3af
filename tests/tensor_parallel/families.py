"""Small models of several families, from their configurations."""

from __future__ import annotations

from typing import Any

from torch import nn


def opt(**changes: Any) -> nn.Module:
    from transformers import OPTConfig, OPTForCausalLM

    config = {
        "vocab_size": 256,
        "hidden_size": 32,
        "word_embed_proj_dim": 32,
        "ffn_dim": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 64,
        "dropout": 0.0,
    }
    return OPTForCausalLM(OPTConfig(**{**config, **changes})).train()  # type: ignore[no-any-return]


def gpt() -> nn.Module:
    from pytest_gputrain.reference.gpt import GPTConfig, build

    return build(GPTConfig())


LLAMA = {
    "vocab_size": 131,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def _causal(kind: str, changes: dict[str, Any]) -> nn.Module:
    import transformers

    config = getattr(transformers, f"{kind}Config")(**{**LLAMA, **changes})
    return getattr(transformers, f"{kind}ForCausalLM")(config).train()  # type: ignore[no-any-return]


def llama(**changes: Any) -> nn.Module:
    return _causal("Llama", changes)


def mistral(**changes: Any) -> nn.Module:
    return _causal("Mistral", changes)


def qwen2(**changes: Any) -> nn.Module:
    return _causal("Qwen2", changes)


def qwen3(**changes: Any) -> nn.Module:
    return _causal("Qwen3", {"head_dim": 16, **changes})
