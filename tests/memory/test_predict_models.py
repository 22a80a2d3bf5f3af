"""Predicted peaks of models that others wrote, of few layers, beside what torch's allocator hands out."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from benchmarks._allocator import measured_peak
from benchmarks.prediction import autocast, hugging_face
from pytest_gputrain import TrainingCase, predict_peak_memory
from pytest_gputrain.reference.gpt import gpt_case
from pytest_gputrain.reference.opt import case as opt

T5 = {"d_model": 64, "d_ff": 128, "num_layers": 2, "num_heads": 4, "d_kv": 16, "decoder_start_token_id": 0}
MAMBA = {"state_size": 8, "use_mambapy": False, "num_hidden_layers": 1}
llama = hugging_face("llama", "LlamaConfig", "LlamaForCausalLM", num_key_value_heads=2)
gpt2 = hugging_face("gpt2", "GPT2Config", "GPT2LMHeadModel")

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore:.gradient_checkpointing_enable")]


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize(
    ("case", "checkpointing", "off"),
    [
        (gpt_case(2, width=64, vocab_size=500, sequence_length=64), False, 0.01),
        (opt, False, 0.01),
        (gpt2, False, 0.01),
        (gpt2, True, 0.01),
        (llama, True, 0.01),
        (autocast(llama, "cpu"), False, 0.02),
        (hugging_face("bert", "BertConfig", "BertForMaskedLM"), False, 0.01),
        (hugging_face("t5", "T5Config", "T5ForConditionalGeneration", **T5), False, 0.01),
        (hugging_face("mamba", "MambaConfig", "MambaForCausalLM", **MAMBA), False, 0.05),
    ],
    ids=lambda value: value.name if isinstance(value, TrainingCase) else str(value),
)
def test_predicted_is_measured(case: TrainingCase, checkpointing: bool, off: float) -> None:
    predicted = predict_peak_memory(case, 4, device="cpu", checkpointing=checkpointing)
    measured = measured_peak(case, 4, checkpointing=checkpointing)
    assert measured == pytest.approx(predicted.peak_bytes, rel=off)
    assert predicted.law.holds
