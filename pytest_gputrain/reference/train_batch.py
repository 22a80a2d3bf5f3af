"""The device batch size of a run, found or given, and what a step makes of it: micro-batches and ranks."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from pytest_gputrain import AccumulationPlan, choose_batch_size, plan_accumulation
from pytest_gputrain.batch.choose import Chosen
from pytest_gputrain.batch.users_own import raised_by_user
from pytest_gputrain.reference.train_arguments import TrainUsageError
from pytest_gputrain.reference.train_checkpoint import Checkpoint
from pytest_gputrain.reference.train_job import Job
from pytest_gputrain.reference.train_options import Options
from pytest_gputrain.reference.train_ranks import Ranks

_log = logging.getLogger("pytest_gputrain.batch")


@dataclass(frozen=True)
class Decision:
    """size: the device batch size that was found or given; the plan's micro-batches are no larger.

    source: "discovered", "cache", "fallback", "manual" or "disabled". seconds: what it took.
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

    Raises OutOfMemory where not even one sample fits, and what the case's own code raises.
    """
    total = options.total_batch_size
    try:
        if total:  # before anything is searched
            plan_accumulation(total, 1, here.world_size)
        with _overheard() as lines:
            chosen = _choose(options, here, job, checkpoint)
        plan = plan_accumulation(total or chosen.size * here.world_size, chosen.size, here.world_size)
    except ValueError as error:
        if raised_by_user(error):
            raise
        raise TrainUsageError(str(error)) from error
    source = _source(lines) if chosen.source == "auto" else chosen.source
    return Decision(chosen.size, source, chosen.seconds, plan)


def _choose(options: Options, here: Ranks, job: Job, checkpoint: Checkpoint | None) -> Chosen:
    searches = options.auto_batch_size and options.device_batch_size is None
    return choose_batch_size(
        model=None,  # the case makes one; this run's own is made after it, within the budget
        max_seq_len=job.tokens,
        device=here.device,
        auto=options.auto_batch_size,
        device_batch_size=options.device_batch_size,
        stage=options.stage,
        pretraining_batch_size=checkpoint.pretraining_batch_size
        if options.is_later_stage and checkpoint
        else None,
        ddp_rank=here.rank,
        ddp_world_size=here.world_size,
        # A size that is given need not divide the total: the last micro-batch is smaller then.
        global_batch_size=options.total_batch_size if searches else None,
        case=job.case,
        safety_margin=options.batch_size_margin,
        max_batch_size=options.max_batch_size,
        use_cache=options.batch_size_cache,
        capacity=options.budget(here.rank),
        eval_batch_factor=options.eval_batch_factor,
        compiled=options.compile,
    )


def _source(lines: list[str]) -> str:
    """The call returns the size alone; where it came from is in what it logs."""
    if any(line.startswith("Cache hit!") for line in lines):
        return "cache"
    return "fallback" if any("falling back" in line for line in lines) else "discovered"


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
