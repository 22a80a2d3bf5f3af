"""Predicted peak memory beside the estimate by formula and what was really handed out.

    python -m benchmarks.prediction                  # on the CPU, by torch's own allocator
    python -m benchmarks.prediction --device cuda    # on a GPU; has not run yet

On the CPU: small models of several kinds, for real, two steps each. And the time of a prediction for the
reference GPT of depth 12 and 20 at 2,048 tokens. On a GPU: depths 12, 20, 26 and 32, several batch sizes,
float32 and bfloat16 autocast, eager and compiled, against ``torch.cuda.max_memory_allocated``.

Claims: a prediction takes under 10 s; on the CPU, programs without convolutions, recurrent layers and
selections by unknown values are predicted within 10 %.
"""

from __future__ import annotations

import argparse
import gc
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from benchmarks._allocator import measured_peak
from benchmarks._harness import options, report
from pytest_gputrain import TrainingCase, predict_peak_memory
from pytest_gputrain.memory.estimate import estimate_memory
from pytest_gputrain.reference.gpt import gpt_case

BATCH_SIZES = (8,)
LENGTH = 64
TIME_CLAIM, ACCURACY_CLAIM = 10.0, 0.10
CUDA_BATCHES, CUDA_ACCURACY_CLAIM = (1, 4, 8), 0.05
SMALL = {
    "vocab_size": 500, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "intermediate_size": 128,
}  # fmt: skip


def hugging_face(name: str, config: str, model: str, **fields: Any) -> TrainingCase:
    def build() -> nn.Module:
        import transformers

        built: nn.Module = getattr(transformers, model)(getattr(transformers, config)(**{**SMALL, **fields}))
        return built

    def batch(batch_size: int, device: Any) -> dict[str, Any]:
        tokens = torch.randint(3, 500, (batch_size, LENGTH)).to(device)
        return {"input_ids": tokens, "labels": tokens.clone()}

    return TrainingCase(
        name=name,
        model=build,
        batch=batch,
        loss=lambda built, drawn: built(**drawn).loss,
        set_checkpointing=lambda built, layers: built.gradient_checkpointing_enable(
            gradient_checkpointing_kwargs={"use_reentrant": False}
        ),
    )


def conv_net() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(16, 32, 3), nn.SiLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10),
    )  # fmt: skip


def images(batch_size: int, device: Any) -> tuple[Any, Any]:
    return torch.randn(batch_size, 3, 32, 32).to(device), torch.randint(10, (batch_size,)).to(device)


def autocast(case: TrainingCase, device: str) -> TrainingCase:
    """The same case with its loss under bfloat16 autocast."""

    def loss(model: Any, batch: Any) -> Any:
        with torch.autocast(device, dtype=torch.bfloat16):
            return case.loss(model, batch)

    return replace(case, name=f"{case.name} bf16", loss=loss)


def cpu_cases() -> Iterator[tuple[TrainingCase, bool]]:
    """(case, with activation checkpointing)."""
    gpt = gpt_case(2, name="gpt", width=64, vocab_size=500, sequence_length=LENGTH)
    gpt2 = hugging_face("gpt2", "GPT2Config", "GPT2LMHeadModel")
    llama = hugging_face("llama", "LlamaConfig", "LlamaForCausalLM", num_key_value_heads=2)
    for case in (gpt, gpt2, llama):
        yield case, False
        yield case, True
    yield autocast(gpt, "cpu"), False
    yield autocast(llama, "cpu"), False
    yield replace(gpt, name="gpt SGD", optimizer=lambda m: torch.optim.SGD(m.parameters(), lr=0.1)), False
    yield hugging_face("bert", "BertConfig", "BertForMaskedLM"), False
    yield (
        TrainingCase(
            name="conv", model=conv_net, batch=images, loss=lambda m, b: F.cross_entropy(m(b[0]), b[1])
        ),
        False,
    )


def on_cpu(batch_sizes: Sequence[int]) -> dict[str, float | int | str]:
    figures: dict[str, float | int | str] = {}
    worst = 0.0
    for case, checkpointing in cpu_cases():
        for size in batch_sizes:
            predicted = predict_peak_memory(case, size, device="cpu", checkpointing=checkpointing)
            measured = measured_peak(case, size, checkpointing=checkpointing)
            estimate = estimate_memory(case, size, LENGTH, checkpointing=checkpointing)
            off = predicted.peak_bytes / measured - 1
            if case.name != "conv":
                worst = max(worst, abs(off))
            label = f"{case.name}{', checkpointed' if checkpointing else ''}, batch {size}"
            figures[label] = (
                f"measured {measured / 2**20:.2f} MiB, predicted {off:+.2%}, "
                f"estimate {estimate.total_bytes / measured - 1:+.0%}"
                + ("" if estimate.activations is not None else " (without activations)")
            )
    return {**figures, "worst without convolutions": worst}


def seconds_to_predict(depths: Sequence[int]) -> dict[str, list[float]]:
    """Processor time, which others on the machine disturb least; one thread."""
    seconds = {}
    for depth in depths:
        case = gpt_case(depth, sequence_length=2048, vocab_size=50304)
        start = time.process_time()
        predict_peak_memory(case, 32, "80GB")
        seconds[f"predict depth {depth}, batch 32, 2048 tokens"] = [time.process_time() - start]
    return seconds


def on_cuda() -> dict[str, float | int | str]:
    """Has not run yet. A configuration that runs out of memory is said, not counted."""
    figures: dict[str, float | int | str] = {}
    worst = 0.0
    for depth in (12, 20, 26, 32):
        plain = gpt_case(depth, sequence_length=2048, vocab_size=50304)
        for case in (plain, autocast(plain, "cuda")):
            for size in CUDA_BATCHES:
                predicted = predict_peak_memory(case, size).peak_bytes
                for compiled in (False, True):
                    label = f"{case.name}, batch {size}, {'compiled' if compiled else 'eager'}"
                    measured = cuda_peak(case, size, compiled)
                    if measured is None:
                        figures[label] = f"out of memory, predicted {predicted / 2**30:.2f} GiB"
                        continue
                    off = predicted / measured - 1
                    worst = worst if compiled else max(worst, abs(off))
                    figures[label] = f"measured {measured / 2**30:.2f} GiB, predicted {off:+.2%}"
    return {**figures, "worst eager": worst}


def cuda_peak(case: TrainingCase, batch_size: int, compiled: bool) -> int | None:
    """Peak of two real steps in bytes, None when they run out of memory."""
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    try:
        model = case.model().cuda().train()
        optimizer = case.optimizer(model)
        trained = case.compile(model) if compiled else model
        for _ in range(2):
            case.step(trained, optimizer, [case.batch(batch_size, torch.device("cuda"))])
        return int(torch.cuda.max_memory_allocated())
    except torch.OutOfMemoryError:
        return None


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and report. Returns 0 when the claims hold; a quick run only has to get to its end."""
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    chosen, rest = parser.parse_known_args(argv)
    given = options(__doc__, rest)
    torch.set_num_threads(1)
    seconds = seconds_to_predict((2,) if given.quick else (12, 20))
    if chosen.device == "cuda":
        if not torch.cuda.is_available():
            print("no GPU here: nothing was measured", file=sys.stderr)
            return 2
        figures = on_cuda()
        held = float(figures["worst eager"]) <= CUDA_ACCURACY_CLAIM
    else:
        figures = on_cpu(BATCH_SIZES[:1] if given.quick else BATCH_SIZES)
        figures["on a GPU"] = "not run"
        held = float(figures["worst without convolutions"]) <= ACCURACY_CLAIM
    held &= max(run for runs in seconds.values() for run in runs) < TIME_CLAIM
    name = "prediction" if chosen.device == "cpu" else "prediction_cuda"
    report(name, seconds, {**figures, "claims_hold": str(held)}, results=given.results)
    return 0 if held or given.quick else 1


if __name__ == "__main__":
    sys.exit(main())
