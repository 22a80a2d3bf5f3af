"""The options of the training script. Every one may be written with underscores or with dashes.

Importing this imports no torch. Batch sizes are counted in samples (sequences), never in tokens.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pytest_gputrain.values import (
    FALSE,
    LEGAL_FLAG,
    LEGAL_SIZE,
    TRUE,
    capacity_in_bytes,
    parse_flag,
    parse_size,
)

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


class TrainUsageError(ValueError):
    """What the user gave cannot be trained with; the message is one line."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """What was asked for; None where the user left it open.

    depth and what belongs to it may come of a checkpoint. lr: None leaves a case's optimizer its own. tokens
    go before steps. block_size, world_size: what a configuration was planned for.
    memory_budget: bytes, one a rank (the last stands for the ranks beyond); empty without a budget.
    """

    stage: str
    dataset: str
    depth: int | None
    width: int | None
    vocab_size: int | None
    sequence_length: int | None
    dropout: float | None
    steps: int
    tokens: int | None
    lr: float | None
    warmup_steps: int | None
    max_norm: float
    optimizer: str
    dtype: str
    checkpointing: bool
    seed: int
    device: str
    auto_batch_size: bool
    device_batch_size: int | None
    total_batch_size: int | None
    max_batch_size: int
    batch_size_margin: float
    batch_size_cache: bool
    memory_budget: tuple[int, ...]
    eval_every: int
    eval_batches: int
    eval_batch_factor: int
    eval_samples: int | None
    case: str | None
    config: Path | None
    block_size: int | None
    world_size: int | None
    checkpoint: Path | None
    out: Path | None
    metrics: Path | None

    @property
    def is_later_stage(self) -> bool:
        return self.stage != "base"

    def budget(self, rank: int) -> int | None:
        """Bytes that this rank may use; None where nothing limits it."""
        return self.memory_budget[min(rank, len(self.memory_budget) - 1)] if self.memory_budget else None


def parse(arguments: Sequence[str] | None = None) -> Options:
    """Read a command line. Raises TrainUsageError, one line that says what is legal."""
    given = _with_config(arguments)
    given["memory_budget"] = given["memory_budget"] or ()
    if given["tokens"] is not None and given["steps"] is not None:
        raise TrainUsageError("--steps and --tokens both say how long to train; give one of them")
    given["steps"] = given["steps"] or DEFAULT_STEPS
    if given["config"] is not None:  # branches are compared: all on the same samples
        given["eval_samples"] = given["eval_samples"] or EVAL_SAMPLES
    if given["case"] is None:
        given["lr"] = given["lr"] or LEARNING_RATES[given["stage"]]
    if given["stage"] != "base" and given["checkpoint"] is None:
        raise TrainUsageError(
            f"--stage {given['stage']} starts from the base stage's checkpoint; give --checkpoint FILE"
        )
    return Options(**given)


def _with_config(arguments: Sequence[str] | None) -> dict[str, Any]:
    """What was given, by itself or in a configuration."""
    parser = _parser()
    given = vars(parser.parse_args(arguments))
    if given["config"] is None:
        return given
    from pytest_gputrain.reference.train_config import ConfigError, defaults_of

    try:
        planned = defaults_of(given["config"], parser)
    except ConfigError as error:
        raise TrainUsageError(str(error)) from None
    if given["steps"] is not None:  # to try a branch out
        del planned["tokens"]
    if given["case"] is None and given["checkpoint"] is None:  # else the model is what it is
        planned.setdefault("sequence_length", planned["block_size"])
    parser.set_defaults(**planned)
    return vars(parser.parse_args(arguments))


def refuse_shape(options: Options, case: str) -> None:
    """Raise TrainUsageError where a shape is asked of a model that is not the script's own."""
    for name in SHAPE:
        if (value := getattr(options, name)) is not None:
            raise TrainUsageError(
                f"--{name} {value} is for the script's own model; the case {case} brings its own"
            )
    if options.stage != "base":
        raise TrainUsageError(
            f"--stage {options.stage} is for the script's own model; the case {case} has none"
        )


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> Any:
        raise TrainUsageError(message)


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="train", description=__doc__.splitlines()[0], allow_abbrev=False)
    for add in (_what, _how, _batch_size, _evaluation, _files):
        add(parser)
    return parser


def _what(parser: argparse.ArgumentParser) -> None:
    _add(
        parser, "stage", str, "base", "pretraining, midtraining, or fine-tuning on documents", choices=STAGES
    )
    _add(parser, "dataset", str, "synthetic", "made-up sequences, or a text as bytes", choices=DATASETS)
    _add(parser, "depth", _whole(1), None, f"layers (default {DEFAULT_DEPTH}, or the checkpoint's)")
    _add(parser, "width", _whole(32), None, "channels, a multiple of 32 (default 64 x depth)")
    _add(parser, "vocab_size", _whole(NUM_BYTES), None, f"tokens that the model knows (default {NUM_BYTES})")
    _add(parser, "sequence_length", _whole(2), None, "tokens a sample (default 64)", "max_seq_len")
    _add(parser, "dropout", _number(0, 1, "in [0, 1)"), None, "probability of dropping a channel (default 0)")
    _add(
        parser, "case", str, None, "MODULE:ATTR of a TrainingCase to train in place of the script's own model"
    )


def _how(parser: argparse.ArgumentParser) -> None:
    text = f"optimizer steps (default {DEFAULT_STEPS})"
    _add(parser, "steps", _whole(1), None, text, "num_iterations")
    _add(parser, "tokens", _whole(1), None, "tokens to see, in place of steps; the last step is cut to fit")
    _add(parser, "lr", _number(0, math.inf, "above 0", low_too=False), None, "highest learning rate")
    _add(parser, "warmup_steps", _whole(0), None, "steps of linear warm-up (default a tenth)")
    _add(
        parser, "max_norm", _number(0, math.inf, "above 0", low_too=False), 1.0, "gradients' norm is cut here"
    )
    _add(parser, "optimizer", str, "adamw", "adamw, or sgd, which keeps no state", choices=("adamw", "sgd"))
    _add(parser, "dtype", str, "float32", "of the products, by autocast", choices=("float32", "bfloat16"))
    _add(parser, "checkpointing", _flag, False, "recompute activations in backward")
    _add(parser, "seed", _whole(0), 1234, "of weights and data")
    _add(
        parser, "device", str, "auto", "auto takes a GPU where there is one", choices=("auto", "cpu", "cuda")
    )


def _batch_size(parser: argparse.ArgumentParser) -> None:
    _add(parser, "auto_batch_size", _flag, False, "find the device batch size that fits")
    _add(parser, "device_batch_size", _whole(1), None, "samples a rank and micro-step; goes before finding")
    _add(
        parser, "total_batch_size", _whole(1), None, "samples an optimizer step, over all ranks (accumulates)"
    )
    _add(parser, "max_batch_size", _whole(1), 128, "largest device batch size that is tried (default 128)")
    share = _number(0, math.nextafter(1, 2), "above 0 and up to 1", low_too=False)
    _add(parser, "batch_size_margin", share, 0.85, "share of the memory that may be used (default 0.85)")
    _add(parser, "batch_size_cache", _flag, False, "look the batch size up, and keep what was found")
    _add(parser, "memory_budget", _sizes, None, 'memory a rank may use, "2GB"; by rank: "2GB,1GB"')


def _evaluation(parser: argparse.ArgumentParser) -> None:
    _add(
        parser, "eval_every", _whole(0), 0, "steps between evaluations; 0 (default) evaluates at the end only"
    )
    _add(parser, "eval_batches", _whole(1), 2, "batches of an evaluation, a rank (default 2)")
    _add(
        parser, "eval_batch_factor", _whole(1), 1, "device batches that evaluation takes at once (default 1)"
    )
    text = f"samples of an evaluation, over all ranks, in place of batches (with --config {EVAL_SAMPLES})"
    _add(parser, "eval_samples", _whole(1), None, text)


def _files(parser: argparse.ArgumentParser) -> None:
    _add(parser, "config", Path, None, "a branch that gputrain branches plan wrote; options go before it")
    # Only a configuration says these.
    for name in ("block_size", "world_size"):
        parser.add_argument(f"--{name}", type=_whole(1), help=argparse.SUPPRESS)
    _add(parser, "checkpoint", Path, None, "start from this file")
    _add(parser, "out", Path, None, "write the checkpoint here, at the end")
    _add(parser, "metrics", Path, None, "write JSON lines here: the steps, then the final one")


def _add(
    parser: argparse.ArgumentParser,
    name: str,
    kind: Callable[[str], Any],
    default: Any,
    text: str,
    alias: str | None = None,
    *,
    choices: Sequence[str] | None = None,
) -> None:
    """One option under all its spellings; a flag may be given bare or as ``--flag=false``."""
    names = [name, alias] if alias else [name]
    spelt = [f"--{s}" for n in names for s in dict.fromkeys((n, n.replace("_", "-")))]
    bare: dict[str, Any] = {"nargs": "?", "const": True} if kind is _flag else {}
    parser.add_argument(*spelt, dest=name, type=kind, default=default, help=text, choices=choices, **bare)


def _legal(text: str) -> argparse.ArgumentTypeError:
    return argparse.ArgumentTypeError(text)


def _whole(least: int) -> Callable[[str], int]:
    def read(text: str) -> int:
        if not text.strip().isdecimal() or int(text) < least:
            raise _legal(f"{text!r} is not a whole number from {least} up")
        return int(text)

    return read


def _number(low: float, high: float, legal: str, *, low_too: bool = True) -> Callable[[str], float]:
    def read(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not (low <= value < high) or (value == low and not low_too):
            raise _legal(f"{text!r} is not a number {legal}")
        return value

    return read


def _flag(text: str) -> bool:
    if text.lower() not in (*TRUE, *FALSE):
        raise _legal(f"{text!r} is not {LEGAL_FLAG}")
    return parse_flag(text)


def _sizes(text: str) -> tuple[int, ...]:
    try:
        sizes = tuple(parse_size(part) for part in text.split(","))
    except ValueError:
        raise _legal(f"{text!r} is not {LEGAL_SIZE}, or several with commas, by rank") from None
    try:
        return tuple(map(capacity_in_bytes, sizes))
    except ValueError as error:
        raise _legal(str(error).removeprefix("capacity=")) from None
