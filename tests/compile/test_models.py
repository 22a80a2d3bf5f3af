"""Models that nobody here wrote, from their configuration: is each compiled, and where is it not?"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from pytest_gputrain import compile_monitor
from pytest_gputrain.compile.backend import standing_in
from pytest_gputrain.compile.monitor import CompileMonitor

pytestmark = pytest.mark.nightly
transformers = pytest.importorskip("transformers")
_SMALL = {"vocab_size": 64, "hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2}


def model_of(name: str) -> Any:
    t: Any = transformers
    torch.manual_seed(0)
    if name == "gpt2":  # ties its embedding, as OPT does
        sizes = {"vocab_size": 64, "n_embd": 16, "n_layer": 3, "n_head": 2, "n_positions": 32}
        return t.GPT2LMHeadModel(t.GPT2Config(**sizes, bos_token_id=0, eos_token_id=0, use_cache=False))
    if name == "opt":
        return t.OPTForCausalLM(t.OPTConfig(**_SMALL, ffn_dim=32, word_embed_proj_dim=16, use_cache=False))
    if name == "bert":
        return t.BertForMaskedLM(t.BertConfig(**_SMALL, intermediate_size=32))
    return t.LlamaForCausalLM(
        t.LlamaConfig(**_SMALL, intermediate_size=32, num_key_value_heads=2, use_cache=False)
    )


def steps(model: Any, monitor: CompileMonitor) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for step in range(3):
        monitor.step(step, "train")
        logits = model(input_ids=torch.randint(0, 64, (2, 8))).logits
        torch.nn.functional.cross_entropy(logits.flatten(0, 1), torch.zeros(16, dtype=torch.long)).backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("name", ["gpt2", "opt", "bert", "llama"])
def test_whole_and_by_layer(name: str) -> None:
    with standing_in("eager"), compile_monitor() as monitor:
        steps(torch.compile(model_of(name), dynamic=False), monitor)
    assert monitor.is_compiled() and not monitor.breaks and not monitor.recompiles, monitor
    assert len(monitor.graphs) == 1 and monitor.report().notes == ()
    with standing_in("eager"), compile_monitor() as monitor:
        model = model_of(name)
        layers = [m for m in model.modules() if type(m).__name__.endswith(("Block", "Layer", "DecoderLayer"))]
        layers = [layer for layer in layers if isinstance(layer, transformers.GradientCheckpointingLayer)]
        for layer in layers:
            layer.compile(dynamic=False)
        steps(model, monitor)
    assert len(layers) == 3
    assert monitor.graph_runs_by_step == {0: 3, 1: 3, 2: 3} and monitor.is_compiled()
    # Layers that carry their own number are compiled one by one, which is a recompile by dynamo's count.
    assert all(found.step == 0 for found in monitor.recompiles), monitor
