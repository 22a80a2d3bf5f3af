"""The training script, compiled, with one thing broken, the one that ``PLANTED_TRAIN`` names.

Run in the place of ``reference/train.py`` by ``plug_broken_compile``. Uncompiled runs are not broken, but for
those of ``loads_nothing``.
"""

from __future__ import annotations

import dataclasses
import os
import sys
from typing import Any

import torch

from pytest_gputrain.reference import train, train_compile, train_loop
from pytest_gputrain.reference.train_job import Job

compiled = train_compile.as_trained


def patch(module: Any, **functions: Any) -> None:
    """The script's own names; it looks them up when it calls them."""
    vars(module).update(functions)


def not_compiled() -> None:
    patch(train, as_trained=lambda options, job, model: model)


def forgets_what_compile_returns() -> None:
    patch(train, as_trained=lambda options, job, model: (compiled(options, job, model), model)[1])


def wrapped_and_eager() -> None:
    def fails(graph: Any, inputs: Any) -> Any:
        raise NotImplementedError("no such kernel")

    def as_trained(options: Any, job: Job, model: torch.nn.Module) -> Any:
        torch._dynamo.config.suppress_errors = True
        return torch.compile(model, backend=fails) if options.compile else model

    patch(train, as_trained=as_trained)


def short_micro_batches() -> None:
    patch(train, num_rows=lambda options, job, length: None)


def rows_that_fill_up_count() -> None:
    patch(train, step_for=lambda job, rows: job.step)


def evaluates_compiled() -> None:
    """At another batch size, and without gradients."""

    def within_ddp(model: Any) -> Any:
        return model.module if isinstance(model, torch.nn.parallel.DistributedDataParallel) else model

    patch(train_loop, unwrapped=within_ddp)


def other_weights() -> None:
    def as_trained(options: Any, job: Job, model: Any) -> Any:
        if options.compile:
            torch.manual_seed(options.seed + 1)
            model.load_state_dict(job.case.model().state_dict())
        return compiled(options, job, model)

    patch(train, as_trained=as_trained)


def saves_the_wrapper() -> None:
    def as_trained(options: Any, job: Job, model: Any) -> Any:
        state = compiled(options, job, model).state_dict
        if options.compile and options.stage == "base":
            object.__setattr__(job, "case", dataclasses.replace(job.case, state_dict=lambda _: state()))
        return compiled(options, job, model)

    patch(train, as_trained=as_trained)


def loads_nothing() -> None:
    def restore(options: Any, checkpoint: Any, model: torch.nn.Module, optimizer: Any) -> None:
        state = {f"_orig_mod.{name}": value for name, value in checkpoint.model.items()}
        model.load_state_dict(state, strict=False)

    patch(train, _restore=restore)


def pads_to_the_longest() -> None:
    sys.argv.append("--padding=longest")


def second_rank_not_compiled() -> None:
    if os.environ["RANK"] == "1":
        not_compiled()


def main() -> int:
    name = os.environ.get("PLANTED_TRAIN", "")
    if name == "loads_nothing" or (name and any(one == "--compile" for one in sys.argv)):
        globals()[name]()
    return train.main()


if __name__ == "__main__":
    sys.exit(main())
