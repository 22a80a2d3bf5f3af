"""``gputrain``: the command line. One module a subcommand, imported when it is asked for.

Exit codes of every subcommand: 0 all is well; 1 something failed; 2 bad input, one line on standard error,
nothing was started; 5 nothing ran, which proves nothing; 130 interrupted.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from pytest_gputrain.cli import branches, check, diagnose, doctor, find_batch, report
from pytest_gputrain.cli.arguments import EXIT_INTERRUPTED, EXIT_USAGE, Parser, UsageError
from pytest_gputrain.endurance.progress import last_words
from pytest_gputrain.variables import unknown

# Each has `declare(commands)`, which adds its parser with `run` as a default: options -> exit code.
_SUBCOMMANDS = (check, report, find_batch, branches, diagnose, doctor)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    options = _parser().parse_args(arguments)
    name = f"gputrain {options.command}"
    try:
        if mistaken := unknown(os.environ):
            raise UsageError(mistaken)
        return int(options.run(options))
    except UsageError as error:
        print(f"{name}: {error}", file=sys.stderr)
        return EXIT_USAGE
    except KeyboardInterrupt:
        print("\n".join([f"{name}: interrupted", *last_words()]), file=sys.stderr)
        return EXIT_INTERRUPTED


def _parser() -> Parser:
    parser = Parser(prog="gputrain", description="Tells the truth about training code.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for subcommand in _SUBCOMMANDS:
        subcommand.declare(commands)
    return parser
