"""Options of ``gputrain check`` for ``stable_training``: how long, and losses to compare with."""

from __future__ import annotations

import argparse
import math
import os
import sys
from pathlib import Path

from pytest_gputrain.cli.arguments import UsageError, positive
from pytest_gputrain.endurance.losses import read_losses
from pytest_gputrain.endurance.plan import StabilityOptions, StabilityUsageError
from pytest_gputrain.endurance.progress import SCREEN, Screen


def declare(check: argparse.ArgumentParser) -> None:
    add = check.add_argument
    add(
        "--iterations",
        type=positive,
        metavar="N",
        help="steps of stable_training (default: up to 300, or about a minute)",
    )
    add("--losses", metavar="FILE", help="losses.txt of an earlier run, which stable_training has to repeat")
    add("--loss-tolerance", type=_tolerance, default=0.0, metavar="X", help="relative (default: exactly)")


def options_of(options: argparse.Namespace) -> StabilityOptions:
    """Raises UsageError: bad input is told before anything runs."""
    try:
        found = StabilityOptions(
            losses=options.losses,
            loss_tolerance=options.loss_tolerance,
        )
        if options.losses:
            read_losses(Path(options.losses))
    except StabilityUsageError as error:
        raise UsageError(str(error)) from None
    return found


def show_progress() -> None:
    """On stderr, so that the table and JSON stay what they are."""
    SCREEN.set(Screen(_write, sys.stderr.isatty() and not os.environ.get("CI")))


def _write(text: str) -> None:
    sys.stderr.write(text)
    sys.stderr.flush()


def _tolerance(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is not legal; give a relative difference, such as 0.01")
    return value
