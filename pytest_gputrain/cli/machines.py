"""``--nnodes``, ``--node-rank``, ``--rdzv-endpoint``: a command that runs on several machines."""

from __future__ import annotations

import argparse
import os
import sys
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

from pytest_gputrain.cli.arguments import UsageError

if TYPE_CHECKING:
    from pytest_gputrain.diagnose.nodes import Session
    from pytest_gputrain.diagnose.programs import Script
    from pytest_gputrain.diagnose.run import Settings
    from pytest_gputrain.launch.nodes.where import Where


def add_machines(parser: argparse.ArgumentParser) -> None:
    """The options; left out, torchrun's and Slurm's variables count."""
    add = parser.add_argument
    add("--nnodes", type=_nnodes, metavar="N", help="machines, each of which runs this command (default: 1)")
    add("--node-rank", type=_node_rank, metavar="R", help="which of the machines this is, from 0")
    add(
        "--rdzv-endpoint",
        metavar="HOST:PORT",
        help="of node 0; without it the nodes are played on this machine",
    )


def _nnodes(text: str) -> int:
    from pytest_gputrain.launch.nodes.where import MOST_NODES

    if not text.strip().isdecimal() or not 1 <= int(text) <= MOST_NODES:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not legal; give a number of machines from 1 to {MOST_NODES}"
        )
    return int(text)


def _node_rank(text: str) -> int:
    if not text.strip().isdecimal():
        raise argparse.ArgumentTypeError(
            f"{text!r} is not legal; give 0 on the first machine, 1 on the next, …"
        )
    return int(text)


def machines(options: argparse.Namespace) -> tuple[int, Where | None]:
    """(number of machines, where they meet); None for one, or if played here. Raises UsageError."""
    from pytest_gputrain.launch import LaunchUsageError
    from pytest_gputrain.launch.nodes import where

    nnodes, node_rank, endpoint = options.nnodes, options.node_rank, options.rdzv_endpoint
    try:
        if endpoint is not None:
            if nnodes is None:
                raise UsageError(f"--rdzv-endpoint {endpoint} needs --nnodes, the number of machines")
            found = where.given(nnodes, node_rank, endpoint)
            return nnodes, found if nnodes > 1 else None
        surroundings = where.by_environment(os.environ) if nnodes != 1 else None
        if surroundings is not None and node_rank is not None:
            where.checked_rank(node_rank, surroundings.nnodes)
            surroundings = replace(surroundings, node_rank=node_rank)
    except LaunchUsageError as error:
        raise UsageError(_as_options(str(error))) from None
    if surroundings is None:
        if node_rank is not None:
            raise UsageError(f"--node-rank {node_rank} needs --rdzv-endpoint HOST:PORT of node 0")
        return nnodes or 1, None
    if nnodes is not None and nnodes != surroundings.nnodes:
        raise UsageError(
            f"--nnodes {nnodes}, and {surroundings.origin} says {surroundings.nnodes}; leave --nnodes out, "
            "or give --rdzv-endpoint HOST:PORT of node 0, or --nnodes 1 for this machine alone"
        )
    return surroundings.nnodes, surroundings


def _as_options(text: str) -> str:
    for name in ("rdzv_endpoint", "node_rank", "nnodes"):
        text = text.replace(f"{name}=", f"--{name.replace('_', '-')} ")
    return text


def joined(program: Script, settings: Settings) -> Session | None:
    """This machine's part of a plan over several; None, and a line said, where the others never came.

    Raises UsageError where this machine cannot be one of them, or another one not.
    """
    from pytest_gputrain.diagnose.nodes import CannotMeet, Session, folder_of

    def why_not(number: int) -> str:
        out = folder_of(settings.out, number)
        if number and out.exists() and (not out.is_dir() or any(out.iterdir())):
            return f"{out}, where node {number} writes, is not empty; give another --out"
        return ""

    try:
        return Session(program, settings.launch.timeout, why_not)
    except CannotMeet as error:
        if error.usage:
            raise UsageError(str(error)) from None
        print(f"gputrain diagnose: {error}", file=sys.stderr, flush=True)
        return None


def followed(session: Session, program: Script, settings: Settings) -> int:
    """Runs this machine's part to the end; the exit code, which is node 0's. Raises UsageError as it does."""
    from pytest_gputrain.diagnose.nodes import CannotMeet, folder_of

    own = replace(settings, out=folder_of(settings.out, session.number))
    try:
        return session.follow(program, own, partial(print, flush=True))
    except CannotMeet as error:
        raise UsageError(str(error)) from None
