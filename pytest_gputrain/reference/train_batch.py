"""The device batch size of a run, found or given, and what a step makes of it: micro-batches and ranks."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from pytest_gputrain.reference.train_checkpoint import Checkpoint
from pytest_gputrain.reference.train_job import Job
from pytest_gputrain.reference.train_options import DEFAULT_DEVICE_BATCH_SIZE, Options, TrainUsageError
from pytest_gputrain.reference.train_ranks import Ranks

_log = logging.getLogger("pytest_gputrain.batch")


@dataclass(frozen=True)
class Decision:
    size: int
    total: int
    micro_batches: tuple[int, ...]
    source: str
    seconds: float
    plan: str = ""

    def figures(self) -> dict[str, Any]:
        return {"device_batch_size": self.size, "total_batch_size": self.total, "batch_size_source": self.source,
                "accumulation_steps": len(self.micro_batches)}


def decide(options: Options, here: Ranks, job: Job, checkpoint: Checkpoint | None) -> Decision:
    size = options.device_batch_size or DEFAULT_DEVICE_BATCH_SIZE
    total = options.total_batch_size or size * here.world_size
    if total % here.world_size:
        raise TrainUsageError("x")
    mine = total // here.world_size
    micro = tuple([size] * (mine // size) + ([mine % size] if mine % size else []))
    return Decision(size, total, micro, "manual", 0.0, "plan")


@contextmanager
def log_to_stdout() -> Iterator[None]:
    """The library's log lines on this process's stdout, as long as this lasts."""
    handler = logging.StreamHandler(sys.stdout)
    level = _log.level
    _log.addHandler(handler)
    _log.setLevel(logging.INFO)
    try:
        yield
    finally:
        _log.removeHandler(handler)
        _log.setLevel(level)
