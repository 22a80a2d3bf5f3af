"""Small models of several families, from their configurations."""

from __future__ import annotations

from typing import Any

import torch
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


def gpt2(**changes: Any) -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = {"vocab_size": 131, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
    off = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    return GPT2LMHeadModel(GPT2Config(**{**config, **off, **changes})).train()  # type: ignore[no-any-return]


def phi3(**changes: Any) -> nn.Module:
    """Queries, keys and values in one projection, gate and up in another."""
    return _causal("Phi3", {"pad_token_id": 0, **changes})


def olmo2(**changes: Any) -> nn.Module:
    """Norms over all heads together."""
    return _causal("Olmo2", changes)


def bert() -> nn.Module:
    """A bias of the head that another module has, too."""
    from transformers import BertConfig, BertForMaskedLM

    off = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    size = {"vocab_size": 131, "hidden_size": 32, "intermediate_size": 48}
    return BertForMaskedLM(  # type: ignore[no-any-return]
        BertConfig(**size, **off, num_hidden_layers=2, num_attention_heads=4)
    ).train()


def neox(**changes: Any) -> nn.Module:
    changes = {"hidden_dropout": 0.0, "attention_dropout": 0.0, **changes}
    return _causal("GPTNeoX", {"intermediate_size": 64, **changes})


def falcon(**changes: Any) -> nn.Module:
    """Adds to the MLP's output in place."""
    from transformers import FalconConfig, FalconForCausalLM

    config = {"vocab_size": 131, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    return FalconForCausalLM(FalconConfig(**{**config, **changes})).train()  # type: ignore[no-any-return]


def stablelm(**changes: Any) -> nn.Module:
    """A norm for each head, in a list."""
    return _causal("StableLm", {"use_qkv_bias": True, "qk_layernorm": True, **changes})


class NanoAttention(nn.Module):
    """In the manner of nanoGPT: the width of a head from the input's width, views to it."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.c_attn = nn.Linear(width, 3 * width)
        self.c_proj = nn.Linear(width, width)
        self.n_head, self.n_embd = heads, width

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, length, width = x.size()
        q, k, v = self.c_attn(x).split(self.n_embd, dim=2)
        q, k, v = (
            part.view(batch, length, self.n_head, width // self.n_head).transpose(1, 2) for part in (q, k, v)
        )
        y = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        out: torch.Tensor = self.c_proj(y.transpose(1, 2).contiguous().view(batch, length, width))
        return out


class NanoGPT(nn.Module):
    def __init__(self, width: int = 32, heads: int = 4) -> None:
        super().__init__()
        self.wte, self.wpe = nn.Embedding(131, width), nn.Embedding(300, width)
        self.h = nn.ModuleList(
            nn.ModuleDict(
                {
                    "ln_1": nn.LayerNorm(width),
                    "attn": NanoAttention(width, heads),
                    "ln_2": nn.LayerNorm(width),
                    "mlp": nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)),
                }
            )
            for _ in range(2)
        )
        self.ln_f = nn.LayerNorm(width)
        self.lm_head = nn.Linear(width, 131, bias=False)
        self.wte.weight = self.lm_head.weight

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.wte(tokens) + self.wpe(torch.arange(tokens.size(1)))
        for block in self.h:
            parts: Any = block
            x = x + parts["attn"](parts["ln_1"](x))
            x = x + parts["mlp"](parts["ln_2"](x))
        logits: torch.Tensor = self.lm_head(self.ln_f(x))
        return logits
