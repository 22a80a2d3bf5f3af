"""A training case: your loop taken apart into named functions. The model is of the transformers library."""

import dataclasses

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from pytest_gputrain import TrainingCase


def model():
    config = LlamaConfig(
        vocab_size=257, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4
    )
    return LlamaForCausalLM(config)


def batch(batch_size, device):
    return {"input_ids": torch.randint(0, 257, (batch_size, 16), device=device)}


def loss(model, batch):
    return model(**batch, labels=batch["input_ids"]).loss


llama = TrainingCase(name="llama", model=model, batch=batch, loss=loss)


def model_with_a_detached_branch():
    broken = model()
    broken.model.layers[0].mlp.register_forward_hook(lambda module, args, output: output.detach())
    return broken


detached = dataclasses.replace(llama, name="detached", model=model_with_a_detached_branch)
