"""How others look for the largest batch size, driven by a memory curve instead of by a model: their own code.

What they try runs out of memory where the curve exceeds capacity, by the exception that they wait for. They
get what suits them best: no safety margin, one step a trial, the same smallest and largest size.
"""

from __future__ import annotations

import gc
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from accelerate.utils import find_executable_batch_size
from pytorch_lightning.tuner.tuning import Tuner
from torch.utils.data import DataLoader, Dataset

from benchmarks._curves import LIMIT, Curve

Trials = list[tuple[int, bool]]
"""(batch size, whether it fit) in the order of trying."""


def run(curve: Curve, batch_size: int, trials: Trials) -> None:
    """Try a size: note it, and run out of memory where the curve does."""
    fits = curve.peak(batch_size) <= curve.capacity
    trials.append((batch_size, fits))
    if not fits:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


def accelerate(curve: Curve) -> tuple[int, Trials]:
    """``find_executable_batch_size``, which starts at the largest and takes 0.9 of it until one fits."""
    trials: Trials = []

    @find_executable_batch_size(starting_batch_size=LIMIT)  # type: ignore[untyped-decorator]
    def train(batch_size: int) -> int:
        run(curve, batch_size, trials)
        return batch_size

    return train(), trials


class Samples(Dataset[int]):
    """More samples than any batch has; a batch is only its size, so that it costs nothing."""

    def __len__(self) -> int:
        return 4 * LIMIT

    def __getitems__(self, indices: list[int]) -> list[int]:
        return indices


def collate(indices: list[int]) -> torch.Tensor:
    """Return the size of the batch."""
    return torch.tensor(len(indices))


class CurveModule(pl.LightningModule):
    """One parameter, trained in batches of ``batch_size``; a step needs the memory that the curve says."""

    def __init__(self, curve: Curve) -> None:
        super().__init__()
        self.curve, self.trials, self.batch_size = curve, Trials(), 1
        self.weight = torch.nn.Parameter(torch.ones(()))

    def train_dataloader(self) -> DataLoader[int]:
        return DataLoader(Samples(), batch_size=self.batch_size, collate_fn=collate)

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        run(self.curve, int(batch), self.trials)
        return self.weight

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.0)


def lightning(curve: Curve, mode: str, folder: Path) -> tuple[int, Trials]:
    """``Tuner.scale_batch_size``: "power" keeps the last power of two that fits, "binsearch" bisects then."""
    off: dict[str, Any] = dict.fromkeys(
        ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False
    )
    trainer = pl.Trainer(accelerator="cpu", devices=1, max_steps=1, default_root_dir=folder, **off)
    module = CurveModule(curve)
    size = Tuner(trainer).scale_batch_size(
        module, mode=mode, steps_per_trial=1, init_val=1, max_val=LIMIT, margin=0.0
    )
    assert size is not None
    return size, module.trials


@contextmanager
def quiet() -> Iterator[None]:
    """No report of each trial, and no search through all of torch for garbage after each: both collect it."""
    loggers = [logging.getLogger(name) for name in ("pytorch_lightning", "lightning.pytorch")]
    before = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    gc.freeze()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # few workers, no validation loop, deprecations of their own
            yield
    finally:
        gc.unfreeze()
        for logger, level in zip(loggers, before, strict=True):
            logger.setLevel(level)
