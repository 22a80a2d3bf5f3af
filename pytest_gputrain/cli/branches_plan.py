"""``gputrain branches plan``: one configuration a branch, which all see the same number of tokens."""

from __future__ import annotations

import argparse
import contextlib
import math
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from pytest_gputrain.cli.arguments import EXIT_FAILED, EXIT_OK, UsageError, add_place, positive

if TYPE_CHECKING:
    from pytest_gputrain.cli.branches_limit import Limit
    from pytest_gputrain.sweep import Branch, BranchPlan

HEADS = (
    "k",
    "target batch",
    "micro-batch",
    "accumulation",
    "effective",
    "rate",
    "steps",
    "last step",
    "tokens",
)
AUTO = "auto"


def declare(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the subcommand's parser."""
    parser = commands.add_parser(
        "plan",
        help="plan the branches and write their configurations",
        description="Plan a branch for each k: batch k x the base batch, its learning rate, accumulation for "
        "what fits on a device, and the same number of tokens for all. Batch sizes count sequences.",
        epilog="Exit codes: 0 planned, 1 no batch fits or the case failed, 2 bad input, 130 interrupted. "
        "Unless it is 0, nothing is written.",
    )
    parser.set_defaults(run=_plan, command="branches plan")
    add = parser.add_argument
    add(
        "--k",
        type=positive,
        nargs="+",
        action="extend",
        required=True,
        metavar="K",
        help="multiples of the base batch",
    )
    add("--base-batch", type=positive, required=True, metavar="N", help="sequences of a step of the base run")
    add("--base-lr", type=_rate, required=True, metavar="RATE", help="learning rate at the base batch")
    add(
        "--lr-scaling", choices=("sqrt", "linear", "none"), default="sqrt", help="of the rate (default: sqrt)"
    )
    add("--block-size", type=positive, required=True, metavar="N", help="tokens of a sequence")
    add("--tokens", type=_tokens, required=True, metavar="N", help="tokens that every branch sees")
    add(
        "--max-device-batch",
        type=_most,
        required=True,
        metavar="N",
        help="most sequences on a device; auto finds it, as find-batch does",
    )
    add("--case", metavar="MODULE:ATTR", help="with auto: the training case (default: GPUTRAIN_CASE)")
    add_place(parser, "with auto: ")
    add("--name", default="branches", metavar="NAME", help="of the sweep, at Weights & Biases")
    add("--out", type=_out, metavar="DIR", help="where to write; without it the table is all")
    add("--force", action="store_true", help="replace another plan in DIR")


def _rate(text: str) -> float:
    try:
        rate = float(text)
    except ValueError:
        rate = math.nan
    if not 0 < rate < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is not legal; give a finite number above 0, such as 3e-4")
    return rate


def _most(text: str) -> int | None:
    """None is what has to be found."""
    try:
        return None if text == AUTO else positive(text)
    except argparse.ArgumentTypeError as error:
        raise argparse.ArgumentTypeError(f"{error}, or {AUTO}") from None


def _tokens(text: str) -> int:
    """Whole numbers, and what people write for large ones: ``1e9``."""
    try:
        return positive(str(int(float(text))) if "e" in text.lower() and float(text).is_integer() else text)
    except (ValueError, OverflowError, argparse.ArgumentTypeError):
        raise argparse.ArgumentTypeError(
            f"{text!r} is not legal; give a whole number of 1 or more, such as 100000 or 1e9"
        ) from None


def _out(text: str) -> Path:
    if not text.strip():  # a shell variable that is not set, rather than the folder one is in
        raise argparse.ArgumentTypeError(f"{text!r} is not legal; give a folder, such as configs")
    return Path(text).expanduser()


def _plan(options: argparse.Namespace) -> int:
    from pytest_gputrain.sweep import write_configs

    limit = _limit(options)
    if limit is None:
        return EXIT_FAILED
    with _as_usage():
        plan = _planned(options, limit.size)
        if options.out is not None:
            write_configs(plan, options.out, force=options.force, max_device_batch_source=limit.source)
    print("\n".join([*_table([HEADS, *map(_row, plan)]), _budget(plan)]))
    if options.max_device_batch is None:
        print(f"at most {limit.size} sequences on a device: {limit.source}")
    if options.out is not None:
        count = f"{len(plan)} configuration{'s' if len(plan) > 1 else ''}"
        print(f"{count} and manifest.json are in {options.out}")
    return EXIT_OK


def _limit(options: argparse.Namespace) -> Limit | None:
    """What fits on a device, given or found; None where it could not be found, which has been told."""
    from pytest_gputrain.cli.branches_limit import Limit, find_limit, refuse_without_auto
    from pytest_gputrain.sweep import check_folder

    if options.max_device_batch is not None:
        refuse_without_auto(options)
        return Limit(options.max_device_batch, "given")
    with _as_usage():  # all that can be wrong, before a search that may take long
        plan = _planned(options, 1)
        if options.out is not None:
            check_folder(options.out, force=options.force)
    return find_limit(options, plan)


def _planned(options: argparse.Namespace, max_device_batch: int) -> BranchPlan:
    from pytest_gputrain.sweep import plan_branches

    return plan_branches(
        k_values=options.k,
        base_batch=options.base_batch,
        base_lr=options.base_lr,
        block_size=options.block_size,
        tokens=options.tokens,
        max_device_batch=max_device_batch,
        world_size=options.world_size,
        lr_scaling=options.lr_scaling,
        base_name=options.name,
    )


@contextlib.contextmanager
def _as_usage() -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        raise UsageError(str(error)) from None


def _row(branch: Branch) -> tuple[str, ...]:
    plan = branch.plan
    last = f" (last {plan.last_micro_batch})" if plan.is_ragged else ""
    return (
        str(branch.k),
        str(plan.target),
        f"{plan.device_batch_size}{last}",
        str(plan.accumulation_steps),
        str(plan.global_batch_size),
        f"{branch.learning_rate:.6g}",
        str(branch.num_steps),
        str(branch.last_step_sequences),
        f"{branch.tokens:,}",
    )


def _table(rows: Sequence[Sequence[str]]) -> Iterable[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        yield "  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True))


def _budget(plan: BranchPlan) -> str:
    """Which number of tokens it is, and why not the one asked for."""
    said = f"every branch sees {plan.tokens:,} tokens: {plan.sequences:,} sequences of {plan.block_size}"
    if plan.tokens == plan.tokens_asked:
        return said
    shared = f", the same number on each of {plan.world_size} ranks" if plan.world_size > 1 else ""
    left = plan.tokens_asked - plan.tokens
    return f"{said}; of the {plan.tokens_asked:,} asked for, {left:,} make no whole one{shared}"
