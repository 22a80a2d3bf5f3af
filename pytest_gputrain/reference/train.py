"""A training script as users write them, on this package's own small GPT. Runs by itself or under torchrun:

    python -m pytest_gputrain.reference.train --depth 4 --steps 20 --auto_batch_size --memory_budget 500MB
    torchrun --nproc_per_node=2 pytest_gputrain/reference/train.py --depth 4 --total_batch_size 64

It trains data parallel with gradient accumulation, clipping and a learning-rate schedule, in three stages
(base, mid, sft), and finds its device batch size with `choose_batch_size`. It prints one line a step and a
last line of JSON. Exit code 2: what was asked for cannot be; 1: out of memory, say; one line says what.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from statistics import median
from typing import Any

import psutil
import torch
from torch import nn

from pytest_gputrain.case import TrainingCase
from pytest_gputrain.case.returned import wrapped_by
from pytest_gputrain.compile.validation import validation
from pytest_gputrain.memory.guard import OomGuard
from pytest_gputrain.reference.train_arguments import TrainUsageError
from pytest_gputrain.reference.train_batch import Decision, decide, log_to_stdout
from pytest_gputrain.reference.train_checkpoint import Checkpoint, check_writable, config_dict, load, save
from pytest_gputrain.reference.train_compile import as_trained, backend_of, num_rows, step_for
from pytest_gputrain.reference.train_config import checked
from pytest_gputrain.reference.train_failure import tell_in_one_line
from pytest_gputrain.reference.train_job import Job, job_of
from pytest_gputrain.reference.train_length import Length, length_of
from pytest_gputrain.reference.train_loop import Course, Loop
from pytest_gputrain.reference.train_options import Options, parse
from pytest_gputrain.reference.train_ranks import Ranks, ranks


def main(arguments: Sequence[str] | None = None, *, case: TrainingCase | None = None) -> int:
    """Train as the options say; ``case`` in place of the script's own model. Returns the exit code.

    Raises OutOfMemory, and what the case's own code raises.
    """
    try:
        options = parse(arguments)
        check_writable(options.out, "--out")
        check_writable(options.metrics, "--metrics")
        checkpoint = load(options.checkpoint) if options.checkpoint else None
        with ranks(options.device) as here, log_to_stdout(), backend_of(options, here.device):
            _train(options, here, job_of(options, checkpoint, case), checkpoint)
    except TrainUsageError as error:
        # On every rank: torchrun ends the others as soon as one has left, which may be before they speak.
        print(f"train: {error}", file=sys.stderr, flush=True)
        return 2
    return 0


@dataclass(frozen=True)
class _Trained:
    model: nn.Module
    optimizer: torch.optim.Optimizer
    course: Course
    peak_bytes: int | None
    seconds: float
    validated: dict[str, Any]


def _train(options: Options, here: Ranks, job: Job, checkpoint: Checkpoint | None) -> None:
    if wrong := checked(vars(options), tokens=job.tokens, world_size=here.world_size):
        raise TrainUsageError(wrong)
    decision = decide(options, here, job, checkpoint)
    length = length_of(options, decision.plan, job.tokens)
    print(decision.plan, flush=True)  # each rank its own, which has to be the same
    start_seconds = _seconds_since_start() - decision.seconds
    done = _under_budget(options, here, job, checkpoint, decision, length)
    if here.is_first:
        if options.out:
            save(_checkpoint(options, job, checkpoint, decision, length, done), options.out)
        _tell(options, length, done, _metrics(options, here, job, decision, length, done, start_seconds))


def _under_budget(
    options: Options,
    here: Ranks,
    job: Job,
    checkpoint: Checkpoint | None,
    decision: Decision,
    length: Length,
) -> _Trained:
    """The training itself; model and optimizer are made inside, so that the budget counts them."""
    watch = validation(enabled=options.validate or None, num_targets=job.case.num_targets)
    with _guard(options, here) as guard, watch:
        torch.manual_seed(options.seed)
        model = job.case.model().to(here.device)
        optimizer = job.case.optimizer(model)
        rates = tuple(options.lr or group["lr"] for group in optimizer.param_groups)
        if checkpoint:
            _restore(options, checkpoint, model, optimizer)
        rows = num_rows(options, job, length)
        loop = Loop(
            options=options,
            ranks=here,
            source=job.source,
            loss=job.case.loss,
            step=step_for(job, rows),
            rates=rates,
            length=length,
            device_batch_size=decision.size,
            validation=watch,
            num_rows=rows,
            first_step=checkpoint.step if checkpoint else 0,
        )
        started = time.perf_counter()
        trained = as_trained(options, job, model)
        course = loop.run(wrapped_by(job.case, trained) if here.world_size > 1 else trained, optimizer)
        seconds = time.perf_counter() - started
    return _Trained(model, optimizer, course, guard.peak_bytes if guard else None, seconds, watch.figures())


@contextmanager
def _guard(options: Options, here: Ranks) -> Iterator[OomGuard | None]:
    """The budget, enforced. Without one a GPU's peak is still measured; on a CPU that would cost speed.

    On a CPU torch runs compiled code eager while its operations are watched, so nothing is watched then.
    """
    budget = options.budget(here.rank)
    if here.device.type == "cpu" and (budget is None or options.compile):
        if budget is not None:
            here.say("--memory_budget is for the search alone: compiled training on a CPU cannot be watched")
        yield None
        return
    with ExitStack() as stack:
        try:
            guard = stack.enter_context(OomGuard(budget, here.device))
        except ValueError as error:  # more than the device has
            raise TrainUsageError(f"--memory_budget: {error}") from error
        yield guard


def _restore(
    options: Options, checkpoint: Checkpoint, model: nn.Module, optimizer: torch.optim.Optimizer
) -> None:
    """Weights always; moments only within a stage, because another stage is another optimisation."""
    try:
        model.load_state_dict(checkpoint.model)
        if checkpoint.stage == options.stage:
            optimizer.load_state_dict(checkpoint.optimizer)
    except (RuntimeError, ValueError) as error:
        raise TrainUsageError(f"--checkpoint {options.checkpoint}: {str(error).splitlines()[0]}") from error


def _checkpoint(
    options: Options,
    job: Job,
    before: Checkpoint | None,
    decision: Decision,
    length: Length,
    done: _Trained,
) -> Checkpoint:
    pretraining = before.pretraining_batch_size if before and options.is_later_stage else decision.size
    return Checkpoint(
        stage=options.stage,
        step=(before.step if before else 0) + length.steps,
        tokens=(before.tokens if before else 0) + length.tokens,
        config=config_dict(job.config),
        device_batch_size=decision.size,
        pretraining_batch_size=pretraining,
        total_batch_size=decision.plan.global_batch_size,
        lr=options.lr or done.optimizer.defaults["lr"],
        model=job.case.state_dict(done.model),
        optimizer=done.optimizer.state_dict(),
    )


def _metrics(
    options: Options,
    here: Ranks,
    job: Job,
    decision: Decision,
    length: Length,
    done: _Trained,
    start_seconds: float,
) -> dict[str, Any]:
    """What the run came to. Times in seconds, of the first rank; ``*_seconds`` do not overlap.

    tokens_per_second: from the median step; the first one warms up and is left out where there are others.
    """
    steps = done.course.step_seconds
    tokens = length.tokens_of(1)
    return {
        "case": job.case.name,
        "stage": options.stage,
        "device": here.device.type,
        "world_size": here.world_size,
        "steps": length.steps,
        "memory_budget": options.budget(here.rank),
        **decision.figures(),
        "start_seconds": start_seconds,
        "discovery_seconds": decision.seconds,
        "training_seconds": done.seconds - done.course.evaluation_seconds,
        "evaluation_seconds": done.course.evaluation_seconds,
        "tokens": length.tokens,
        "tokens_per_second": tokens / median(steps[1:] or steps),
        "first_loss": done.course.losses[0],
        "final_loss": done.course.losses[-1],
        "eval_loss": done.course.eval_loss,
        "peak_bytes": done.peak_bytes,
        "compiled": options.compile,
        **({"validation": done.validated} if done.validated else {}),
    }


def _tell(options: Options, length: Length, done: _Trained, metrics: dict[str, Any]) -> None:
    line = json.dumps(metrics)
    if options.metrics:
        steps = enumerate(zip(done.course.losses, done.course.rates, strict=True), 1)
        records = (
            {"step": number, "loss": loss, "tokens": length.tokens_until(number), "learning_rate": rate}
            for number, (loss, rate) in steps
        )
        text = "".join(json.dumps(record) + "\n" for record in records)
        options.metrics.write_text(text + line + "\n", encoding="utf-8")
    print(line, flush=True)


def _seconds_since_start() -> float:
    """Seconds since this process was made: interpreter, imports, process group, checkpoint."""
    return time.time() - psutil.Process().create_time()


if __name__ == "__main__":
    tell_in_one_line()
    sys.exit(main())
