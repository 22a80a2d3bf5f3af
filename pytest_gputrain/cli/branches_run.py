"""``gputrain branches run``: every planned branch from one checkpoint, each with its own verdict."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pytest_gputrain.cli.arguments import (
    EXIT_FAILED,
    EXIT_INTERRUPTED,
    EXIT_OK,
    UsageError,
    add_deadlines,
    device,
    positive,
)
from pytest_gputrain.cli.branches_results import draw, table

if TYPE_CHECKING:
    from pytest_gputrain.sweep.manifest import PlannedBranch
    from pytest_gputrain.sweep.prepare import Asked, Prepared

_LEASES = ("GPUTRAIN_LEASE_DIR", "GPUTRAIN_LEASE_TIMEOUT")


def declare(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the subcommand's parser."""
    parser = commands.add_parser(
        "run",
        help="run the planned branches from a checkpoint",
        usage="gputrain branches run DIR --checkpoint FILE [options] -- SCRIPT [argument ...]",
        description="Run every branch planned in DIR from one checkpoint: SCRIPT with its arguments and, "
        "behind them, --config FILE --checkpoint FILE --metrics FILE; or with {config}, {checkpoint}, "
        "{metrics} and names of the configuration, such as {learning_rate}, where its arguments have them.",
        epilog="Exit codes: 0 every branch passed, 1 one did not, 2 bad input (nothing was started), 130 "
        "interrupted (what there is is written).",
    )
    parser.set_defaults(run=_run, command="branches run")
    add = parser.add_argument
    add("folder", type=Path, metavar="DIR", help="what branches plan --out wrote")
    add("--checkpoint", type=Path, required=True, metavar="FILE", help="what all branches start from")
    add("--out", type=Path, metavar="RESULTS", help="folder of logs and results (default: DIR/results)")
    add("--nproc", type=positive, metavar="N", help="ranks of a branch (default: those planned)")
    add("--device", type=device, help="cpu or cuda (default: cuda where there is a GPU)")
    add("--jobs", type=positive, metavar="N", help="branches at once (default: what the GPUs allow; cpu: 1)")
    add("--k", type=positive, nargs="+", action="extend", metavar="K", help="run only these")
    add(
        "--index",
        type=_index,
        metavar="I",
        help="run only the I-th of the plan, from 0; for an array of jobs",
    )
    add("--rerun", action="store_true", help="run again what is done already")
    add("--dry-run", action="store_true", help="check everything, print the commands, run nothing")
    add("--yes", action="store_true", help="do not ask")
    add("-m", dest="module", action="store_true", help="SCRIPT is a module, as for python -m")
    add_deadlines(parser)
    # At least one: else argparse takes DIR and no command together, and then knows no place for it.
    add("script", nargs="+", metavar="SCRIPT", help="the training script; what follows it is its own")


def _index(text: str) -> int:
    if not text.strip().isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is not legal; give a whole number of 0 or more")
    return int(text)


def _run(options: argparse.Namespace) -> int:
    from pytest_gputrain.sweep.prepare import prepare
    from pytest_gputrain.sweep.runner import run_prepared

    try:
        prepared = prepare(_asked(options), dry=options.dry_run)
        if options.dry_run:
            print("\n".join(prepared.line(branch) for branch in prepared.branches))
            return EXIT_OK
        if not _agreed(options, prepared):
            print("nothing was started")
            return EXIT_OK
        result = run_prepared(prepared, tell=_tell)
    except ValueError as error:  # SweepError, LaunchUsageError: before anything has started
        raise UsageError(str(error)) from None
    print("\n".join(table(result.all_results)))
    if result.unwritten:
        _tell(result.unwritten)
    print(f"results in {result.path}")
    if lack := draw(result.all_results, prepared):
        print(lack)
    if result.interrupted:
        sys.stdout.flush()  # or the table comes after it, where both go to one file
        print("gputrain branches run: interrupted; the same command goes on from here", file=sys.stderr)
        return EXIT_INTERRUPTED
    return EXIT_OK if result.passed else EXIT_FAILED


def _asked(options: argparse.Namespace) -> Asked:
    from pytest_gputrain.sweep.command import Command
    from pytest_gputrain.sweep.prepare import STALL, TIMEOUT, Asked
    from pytest_gputrain.values import parse_seconds

    folder, lease_timeout = (os.environ.get(name, "").strip() for name in _LEASES)
    try:
        lease_seconds = parse_seconds(lease_timeout) if lease_timeout else None
    except ValueError as error:
        raise UsageError(f"{_LEASES[1]}: {error}") from None
    script, *arguments = options.script
    return Asked(
        folder=options.folder,
        checkpoint=options.checkpoint,
        command=Command(script, tuple(arguments), options.module),
        out=options.out,
        nproc=options.nproc,
        device=options.device or _device(),
        jobs=options.jobs,
        k_values=_chosen(options),
        rerun=options.rerun,
        timeout=options.timeout or TIMEOUT,
        stall=options.stall or STALL,
        lease_dir=Path(folder) if folder else None,
        lease_timeout=lease_seconds,
    )


def _device() -> str:
    from pytest_gputrain.devices import discover, visible_gpus

    try:
        return "cuda" if visible_gpus(discover(), os.environ) else "cpu"
    except ValueError as error:  # GPUTRAIN_FAKE_GPUS
        raise UsageError(str(error)) from None


def _chosen(options: argparse.Namespace) -> Sequence[int] | None:
    """The k values asked for, by themselves or by place."""
    if options.index is None:
        return options.k  # type: ignore[no-any-return]
    if options.k is not None:
        raise UsageError("--index and --k both choose branches; give one of them")
    from pytest_gputrain.sweep import read_manifest

    try:
        manifest = read_manifest(options.folder)
    except ValueError as error:
        raise UsageError(str(error)) from None
    if options.index >= len(manifest):
        raise UsageError(
            f"--index {options.index}: {options.folder} has {len(manifest)} branches; "
            f"give 0 to {len(manifest) - 1}"
        )
    return [manifest.branches[options.index].k]


def _agreed(options: argparse.Namespace, prepared: Prepared) -> bool:
    """Say what will run, and ask where somebody sits who can answer."""
    from pytest_gputrain.sweep.runner import done_before

    done = done_before(prepared)
    todo = [branch for branch in prepared.branches if branch.k not in done]
    _tell(f"gputrain branches run: {_head(todo, prepared)}")
    for branch in prepared.branches:
        if branch.edited:
            _tell(f"{branch.config} has been edited since it was planned")
    if options.yes or not todo or not (sys.stdin.isatty() and sys.stdout.isatty()):
        return True
    return input("start? [y/N] ").strip().lower() in ("y", "yes")


def _head(todo: Sequence[PlannedBranch], prepared: Prepared) -> str:
    ranks = f"{prepared.num_ranks} rank" + "s" * (prepared.num_ranks > 1)
    where = f"{ranks} each on {prepared.asked.device}, {min(prepared.jobs, max(1, len(todo)))} at once"
    done = len(prepared.branches) - len(todo)
    count = f"{len(todo)} branch" + "es" * (len(todo) != 1)
    return (
        f"{count} of {prepared.manifest.folder}"
        + (f" ({done} done before)" if done else "")
        + f" from {prepared.checkpoint.path}, {where}; results in {prepared.out}"
    )


def _tell(text: Any) -> None:
    print(text, flush=True)
