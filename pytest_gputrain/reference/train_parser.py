"""Every option of the training script, with its values, its default and its help.

Batch sizes are counted in samples (sequences), never in tokens. Importing this imports no torch.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

from pytest_gputrain.reference.train_arguments import Parser, add, flag, number, sizes, whole

STAGES = ("base", "mid", "sft")
DATASETS = ("synthetic", "text")
# Later stages move an already trained model: nanochat's ratios in the round.
LEARNING_RATES = {"base": 1e-3, "mid": 3e-4, "sft": 1e-4}
DEFAULT_DEPTH = 4
DEFAULT_STEPS = 20
EVAL_SAMPLES = 128
SHAPE = ("depth", "width", "vocab_size", "sequence_length", "dropout")
DEFAULT_SEQUENCE_LENGTH = 64
NUM_BYTES = 256  # tokens are bytes; a larger vocabulary only costs memory, as a real one does


def make_parser() -> argparse.ArgumentParser:
    parser = Parser(prog="train", description="Train a small GPT, or a TrainingCase.", allow_abbrev=False)
    for declare in (_what, _how, _batch_size, _compiling, _evaluation, _files):
        declare(parser)
    return parser


def _what(parser: argparse.ArgumentParser) -> None:
    add(parser, "stage", str, "base", "pretraining, midtraining, or fine-tuning on documents", choices=STAGES)
    add(parser, "dataset", str, "synthetic", "made-up sequences, or a text as bytes", choices=DATASETS)
    add(parser, "depth", whole(1), None, f"layers (default {DEFAULT_DEPTH}, or the checkpoint's)")
    add(parser, "width", whole(32), None, "channels, a multiple of 32 (default 64 x depth)")
    add(parser, "vocab_size", whole(NUM_BYTES), None, f"tokens that the model knows (default {NUM_BYTES})")
    add(
        parser,
        "sequence_length",
        whole(2),
        None,
        "tokens a sample (default 64, or the checkpoint's)",
        "max_seq_len",
    )
    add(parser, "dropout", number(0, 1, "in [0, 1)"), None, "probability of dropping a channel (default 0)")
    add(
        parser, "case", str, None, "MODULE:ATTR of a TrainingCase to train in place of the script's own model"
    )


def _how(parser: argparse.ArgumentParser) -> None:
    text = f"optimizer steps (default {DEFAULT_STEPS})"
    add(parser, "steps", whole(1), None, text, "num_iterations")
    add(parser, "tokens", whole(1), None, "tokens to see, in place of steps; the last step is cut to fit")
    add(parser, "lr", number(0, math.inf, "above 0", low_too=False), None, "highest learning rate")
    add(parser, "warmup_steps", whole(0), None, "steps of linear warm-up (default a tenth)")
    add(parser, "max_norm", number(0, math.inf, "above 0", low_too=False), 1.0, "gradients' norm is cut here")
    add(parser, "optimizer", str, "adamw", "adamw, or sgd, which keeps no state", choices=("adamw", "sgd"))
    add(parser, "dtype", str, "float32", "of the products, by autocast", choices=("float32", "bfloat16"))
    add(parser, "checkpointing", flag, False, "recompute activations in backward")
    add(parser, "seed", whole(0), 1234, "of weights and data")
    add(parser, "device", str, "auto", "auto takes a GPU where there is one", choices=("auto", "cpu", "cuda"))


def _batch_size(parser: argparse.ArgumentParser) -> None:
    add(parser, "auto_batch_size", flag, False, "find the device batch size that fits")
    add(parser, "device_batch_size", whole(1), None, "samples a rank and micro-step; goes before finding")
    add(parser, "total_batch_size", whole(1), None, "samples an optimizer step, over all ranks (accumulates)")
    add(parser, "max_batch_size", whole(1), 128, "largest device batch size that is tried (default 128)")
    share = number(0, math.nextafter(1, 2), "above 0 and up to 1", low_too=False)
    add(parser, "batch_size_margin", share, 0.85, "share of the memory that may be used (default 0.85)")
    add(parser, "batch_size_cache", flag, False, "look the batch size up, and keep what was found")
    add(parser, "memory_budget", sizes, None, 'memory a rank may use, "2GB"; by rank: "2GB,1GB"')


def _compiling(parser: argparse.ArgumentParser) -> None:
    add(parser, "compile", flag, False, "torch.compile(model, dynamic=False), or as the case does it")
    add(parser, "compile_backend", str, None, "in place of inductor: aot_eager, or eager; needs no compiler")
    text = "documents to max_seq_len, or to the longest of each batch, which compiles again and again"
    add(parser, "padding", str, "max_seq_len", text, choices=("max_seq_len", "longest"))
    add(parser, "validate", flag, False, "say what is compiled, on which shapes, and how fast")


def _evaluation(parser: argparse.ArgumentParser) -> None:
    add(parser, "eval_every", whole(0), 0, "steps between evaluations; 0 (default) evaluates at the end only")
    add(parser, "eval_batches", whole(1), 2, "batches of an evaluation, a rank (default 2)")
    add(parser, "eval_batch_factor", whole(1), 1, "device batches that evaluation takes at once (default 1)")
    text = f"samples of an evaluation, over all ranks, in place of batches (with --config {EVAL_SAMPLES})"
    add(parser, "eval_samples", whole(1), None, text)


def _files(parser: argparse.ArgumentParser) -> None:
    add(parser, "config", Path, None, "a branch that gputrain branches plan wrote; options go before it")
    # Only a configuration says these.
    for name in ("block_size", "world_size"):
        parser.add_argument(f"--{name}", type=whole(1), help=argparse.SUPPRESS)
    add(parser, "checkpoint", Path, None, "start from this file")
    add(parser, "out", Path, None, "write the checkpoint here, at the end")
    add(parser, "metrics", Path, None, "write JSON lines here: the steps, then the final one")
