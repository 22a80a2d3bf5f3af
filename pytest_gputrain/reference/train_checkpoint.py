"""Checkpoints of the training script: plain data and tensors in one file, written whole or not at all.

A checkpoint holds what the next run needs (model, optimizer state, step, configuration) and what it is told
of this one (stage, batch sizes, tokens). Loading takes no pickled code: ``weights_only=True``.
"""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch

from pytest_gputrain.reference.gpt import GPTConfig
from pytest_gputrain.reference.train_arguments import TrainUsageError

FORMAT = "pytest-gputrain training checkpoint 1"


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """config: the fields of `GPTConfig`, empty for a user's case. step, tokens: so far, over all stages."""

    stage: str
    step: int
    tokens: int
    config: dict[str, Any]
    device_batch_size: int
    pretraining_batch_size: int
    total_batch_size: int
    lr: float
    model: dict[str, Any]
    optimizer: dict[str, Any]


def save(checkpoint: Checkpoint, path: Path) -> None:
    """Write a file that is either the old one or the new one, whenever this process dies."""
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    values = {field.name: getattr(checkpoint, field.name) for field in fields(Checkpoint)}
    try:
        torch.save({"format": FORMAT, **values}, unfinished)
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)


def load(path: Path) -> Checkpoint:
    """Read what `save` wrote, tensors on the CPU. Raises TrainUsageError where that is not there."""
    if not path.is_file():
        raise TrainUsageError(
            f"--checkpoint {path}: there is no such file; --out of an earlier run writes one"
        )
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises several types for files that it did not write
        raise TrainUsageError(f"--checkpoint {path}: cannot be read ({_first_line(error)})") from error
    if not isinstance(content, dict) or content.pop("format", None) != FORMAT:
        raise TrainUsageError(
            f"--checkpoint {path}: not written by this script; give a file that --out wrote"
        )
    try:
        return Checkpoint(**content)
    except TypeError as error:
        raise TrainUsageError(f"--checkpoint {path}: fields are missing ({_first_line(error)})") from error


def check_writable(path: Path | None, option: str) -> None:
    """Raise TrainUsageError where a file cannot be written, before training. Makes its folder."""
    if path is None:
        return
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        writable = os.access(path.parent, os.W_OK) and not path.is_dir()
    except OSError:
        writable = False
    if not writable:
        raise TrainUsageError(f"{option} {path}: cannot be written; give a file in a folder that can")


def config_of(given: dict[str, Any], checkpoint: Checkpoint | None) -> GPTConfig:
    """The model's shape: the checkpoint's, of which options may change the length only; else the options'.

    given: options by field name, None where the user said nothing. Raises TrainUsageError.
    """
    said = {name: value for name, value in given.items() if value is not None}
    if checkpoint is None:
        return GPTConfig(**said)
    if not checkpoint.config:
        raise TrainUsageError(
            "the checkpoint is of another model than this script's; its case has to be given"
        )
    # Positions are computed and not learnt, so that a later stage may take longer or shorter samples.
    length = said.pop("sequence_length", checkpoint.config["sequence_length"])
    for name, value in said.items():
        if checkpoint.config.get(name) != value:
            raise TrainUsageError(
                f"--{name} {value} is not the checkpoint's {checkpoint.config.get(name)}; leave it out"
            )
    return GPTConfig(**{**checkpoint.config, "sequence_length": length})


def config_dict(config: GPTConfig | None) -> dict[str, Any]:
    """A configuration as plain data."""
    return asdict(config) if config else {}


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
