"""What torch.compile is worth on a GPU: the reference GPT and OPT-125M, bfloat16, with the checks' verdicts.

    python -m benchmarks.compile_gpu

The GPT at depth 12 and 20 and Hugging Face's OPT-125M (its configuration, fresh weights), 4 x 2048 tokens,
autocast to bfloat16: eager and compiled in turn (``compile_speed``'s own measurement), the first compile,
peak memory, recompiles, and what compile_no_recompiles, compile_parity and compile_speed say. Needs a GPU;
without one it says so in a line and measures nothing. ``--quick``: one small model.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence
from functools import partial
from typing import Any

from benchmarks._harness import options, write
from pytest_gputrain.case import TrainingCase

BATCH_SIZE, LENGTH = 4, 2048
DEPTHS = (12, 20)
CHECKS = ("compile_no_recompiles", "compile_parity", "compile_speed")
NO_GPU = "no GPU here: compile_gpu measures compiled training on one, and nothing was measured"


def half_loss(loss: Any, model: Any, batch: Any) -> Any:
    """The case's loss under autocast."""
    import torch

    with torch.autocast("cuda", torch.bfloat16):
        return loss(model, batch)


def gpt(depth: int, length: int = LENGTH) -> TrainingCase:
    from pytest_gputrain.reference.gpt import gpt_case

    return in_half(gpt_case(depth, sequence_length=length, vocab_size=50_304))


def in_half(case: TrainingCase) -> TrainingCase:
    """In bfloat16 and of this benchmark's batch, whatever size a check asks for."""
    return dataclasses.replace(
        case, loss=partial(half_loss, case.loss), batches=partial(stream, case), name=f"{case.name}-bf16"
    )


def stream(case: TrainingCase) -> Any:
    """Eight batches of 4 sequences."""
    import torch

    return (case.batch(BATCH_SIZE, torch.device("cpu")) for _ in range(8))


def opt_model() -> Any:
    """OPT-125M's architecture without dropout, fresh weights."""
    from transformers import OPTConfig, OPTForCausalLM

    return OPTForCausalLM(OPTConfig(dropout=0.0, attention_dropout=0.0, max_position_embeddings=LENGTH))


def opt_batch(batch_size: int, device: Any) -> dict[str, Any]:
    import torch

    tokens = torch.randint(4, 50_000, (batch_size, LENGTH)).to(device)
    return {"input_ids": tokens, "labels": tokens}


def opt_loss(model: Any, batch: Any) -> Any:
    return model(**batch).loss


def opt() -> TrainingCase:
    return in_half(TrainingCase(name="opt-125m", model=opt_model, batch=opt_batch, loss=opt_loss))


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and report. Returns 0 where every check passed or skipped, 2 without a GPU."""
    import os

    from pytest_gputrain.checks import run_checks
    from pytest_gputrain.devices import discover, visible_gpus

    given = options(__doc__, argv)
    if not visible_gpus(discover(), os.environ):
        print(NO_GPU, file=sys.stderr)
        return 2
    cases = [gpt(2, 128)] if given.quick else [*map(gpt, DEPTHS), opt()]
    figures: dict[str, float | int | str] = {"batch": f"{BATCH_SIZE} x {LENGTH} tokens, bfloat16 by autocast"}
    measured: dict[str, object] = {}
    good = True
    for case in cases:
        for result in run_checks(case, checks=CHECKS, device="cuda"):
            good &= result.outcome in ("passed", "skipped")
            print(result, flush=True)
            figures[f"{case.name}: {result.check}"] = result.outcome
            measured[f"{case.name}: {result.check}"] = {
                "message": result.message,
                "seconds": round(result.seconds, 1),
                **dict(result.figures),
            }
            if result.check == "compile_speed" and "ratio" in result.figures:
                figures[f"{case.name}: ratio"] = result.figures["ratio"]
    write("compile_gpu", figures, measured, given.results)
    return 0 if good or given.quick else 1


if __name__ == "__main__":
    sys.exit(main())
