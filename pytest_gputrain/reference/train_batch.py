"""The device batch size of a run, found or given, and what a step makes of it: micro-batches and ranks."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from pytest_gputrain import discover_batch_size, plan_accumulation
from pytest_gputrain.batch.accumulation import AccumulationPlan
from pytest_gputrain.reference.train_checkpoint import Checkpoint
from pytest_gputrain.reference.train_job import Job
from pytest_gputrain.reference.train_options import DEFAULT_DEVICE_BATCH_SIZE, Options, TrainUsageError
from pytest_gputrain.reference.train_ranks import Ranks

_log = logging.getLogger("pytest_gputrain.batch")


@dataclass(frozen=True)
class Decision:
    """size: the device batch size that was found or given; the plan's micro-batches are no larger.

    source: "discovered", "cache", "fallback", "override" or "disabled". seconds: what it took.
    """

    size: int
    source: str
    seconds: float
    plan: AccumulationPlan

    def figures(self) -> dict[str, Any]:
        return {
            "device_batch_size": self.size,
            "batch_size_source": self.source,
            "accumulation_steps": self.plan.accumulation_steps,
            "total_batch_size": self.plan.global_batch_size,
        }


def decide(options: Options, here: Ranks, job: Job, checkpoint: Checkpoint | None) -> Decision:
    """The same on every rank. Raises TrainUsageError for a batch that ranks cannot share and the like.

    Raises OutOfMemory where not even one sample fits.
    """
    began = time.perf_counter()
    try:
        if options.total_batch_size:  # before anything is searched
            plan_accumulation(options.total_batch_size, 1, here.world_size)
        size, source = _size(options, here, job)
        plan = plan_accumulation(options.total_batch_size or size * here.world_size, size, here.world_size)
    except ValueError as error:
        raise TrainUsageError(str(error)) from error
    if checkpoint and options.stage != "base":
        _warn_of_growth(options.stage, size, checkpoint.pretraining_batch_size)
    return Decision(size, source, time.perf_counter() - began, plan)


def _size(options: Options, here: Ranks, job: Job) -> tuple[int, str]:
    if not options.auto_batch_size and options.device_batch_size is None:
        _log.info("Auto-discovery disabled, using default device_batch_size=%d", DEFAULT_DEVICE_BATCH_SIZE)
        return DEFAULT_DEVICE_BATCH_SIZE, "disabled"
    manual = options.device_batch_size
    with _overheard() as lines:
        size = discover_batch_size(
            model=None,  # the case makes one; this run's own is made after it, within the budget
            max_seq_len=job.tokens,
            device=here.device,
            safety_margin=options.batch_size_margin,
            max_batch_size=options.max_batch_size,
            ddp_rank=here.rank,
            ddp_world_size=here.world_size,
            use_cache=options.batch_size_cache,
            case=job.case,
            # A size that is given need not divide the total: the last micro-batch is smaller then.
            global_batch_size=options.total_batch_size if manual is None else None,
            override=manual,
            capacity=options.budget(here.rank),
            eval_batch_factor=options.eval_batch_factor,
        )
    return size, "override" if manual else _source(lines)


def _source(lines: list[str]) -> str:
    """The call returns the size alone; where it came from is in what it logs."""
    if any(line.startswith("Cache hit!") for line in lines):
        return "cache"
    return "fallback" if any("falling back" in line for line in lines) else "discovered"


def _warn_of_growth(stage: str, size: int, pretraining: int) -> None:
    if size > pretraining:
        _log.warning(
            "stage %s: device_batch_size=%d exceeds pretraining device_batch_size=%d; "
            "what was tuned for that batch may not hold for this one",
            stage,
            size,
            pretraining,
        )


@contextmanager
def _overheard() -> Iterator[list[str]]:
    """What the library logs while this lasts."""
    lines: list[str] = []
    listener = logging.Handler()
    listener.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    _log.addHandler(listener)
    try:
        yield lines
    finally:
        _log.removeHandler(listener)


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
