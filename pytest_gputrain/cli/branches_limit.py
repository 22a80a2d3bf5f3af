"""The most sequences that fit on a device, for branches: found as ``gputrain find-batch`` finds them.

It is asked for the largest branch's batch, so a probed step accumulates where that batch does not fit at
once: then gradients are there during forward, as they will be in the branches.
"""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING, Any, NamedTuple

from pytest_gputrain.cli import find_batch
from pytest_gputrain.cli.arguments import Parser, UsageError
from pytest_gputrain.values import format_size

if TYPE_CHECKING:
    from pytest_gputrain.cli.find_batch_answer import Answer
    from pytest_gputrain.sweep import BranchPlan

# What `branches plan` takes for this alone, by the names of its options.
OPTIONS = ("case", "capacity", "device")


class Limit(NamedTuple):
    """``source`` says how it was found, on what and for which case."""

    size: int
    source: str


def refuse_without_auto(options: argparse.Namespace) -> None:
    """Raise UsageError for an option of this search where nothing is searched."""
    for name in OPTIONS:
        if getattr(options, name) is not None:
            raise UsageError(
                f"--{name} is for --max-device-batch auto; here it is {options.max_device_batch}, "
                f"so leave --{name} out"
            )


def find_limit(options: argparse.Namespace, plan: BranchPlan) -> Limit | None:
    """Search for the branches of ``plan``, telling on standard error; None where nothing fits or the case
    failed, and that has been told. Raises UsageError.
    """
    asked = _as_find_batch(options, plan)
    answer = find_batch.search(asked, sys.stderr)
    if answer is None:
        return None
    print(answer.text(), file=sys.stderr, flush=True)
    return Limit(answer.size, _source(answer)) if answer.size else None


def _as_find_batch(options: argparse.Namespace, plan: BranchPlan) -> argparse.Namespace:
    """What was asked for in find-batch's own words, everything else as it is there by default."""
    parser = Parser(prog="gputrain")
    commands: Any = parser.add_subparsers()
    find_batch.declare(commands)
    largest = max(branch.global_batch_size for branch in plan)
    words = [f"--global-batch={largest}", f"--world-size={plan.world_size}"]
    words += [f"--{name}={value}" for name in OPTIONS[1:] if (value := getattr(options, name)) is not None]
    asked = parser.parse_args(["find-batch", *words, *(["--", options.case] if options.case else [])])
    asked.block_size = options.block_size
    return asked


def _source(answer: Answer) -> str:
    within = f" within {format_size(answer.capacity)}" if answer.given else ""
    return f"{answer.method} for the case {answer.case} on {answer.device}{within}"
