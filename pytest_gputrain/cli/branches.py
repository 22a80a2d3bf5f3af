"""``gputrain branches``: a sweep over batch sizes from one checkpoint. One module a subcommand of its own."""

from __future__ import annotations

import argparse

from pytest_gputrain.cli import branches_plan, branches_run

# Each has `declare(commands)`, as the subcommands of `gputrain`; it sets `command` too, for the messages.
_SUBCOMMANDS = (branches_plan, branches_run)


def declare(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the subcommand's parser, with those of its own subcommands."""
    parser = commands.add_parser(
        "branches",
        help="plan and run branches of a base run at several batch sizes",
        description="Branches of a base run at several batch sizes, from one checkpoint.",
    )
    own = parser.add_subparsers(dest="branches_command", required=True, metavar="COMMAND")
    for subcommand in _SUBCOMMANDS:
        subcommand.declare(own)
