"""What the training script was asked for: options by themselves or in a configuration, checked together.

Importing this imports no torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pytest_gputrain.reference.train_arguments import TrainUsageError
from pytest_gputrain.reference.train_parser import (
    DEFAULT_STEPS,
    EVAL_SAMPLES,
    LEARNING_RATES,
    SHAPE,
    make_parser,
)


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
    padding: str
    compile: bool
    compile_backend: str | None
    validate: bool
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
    if given["padding"] == "longest" and given["stage"] != "sft":
        raise TrainUsageError(f"--padding longest is for --stage sft; here it is {given['stage']}")
    if given["compile_backend"] is not None and not given["compile"]:
        raise TrainUsageError("--compile_backend is for --compile; give both, or none")
    return Options(**given)


def _with_config(arguments: Sequence[str] | None) -> dict[str, Any]:
    """What was given, by itself or in a configuration."""
    parser = make_parser()
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
