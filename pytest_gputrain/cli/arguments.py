"""What the subcommands share: exit codes, the one-line usage error, and how arguments are read."""

from __future__ import annotations

import argparse
import difflib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from pytest_gputrain.values import LEGAL_FLAG, LEGAL_SECONDS, parse_flag, parse_seconds

EXIT_OK, EXIT_FAILED, EXIT_USAGE, EXIT_NOTHING_RAN, EXIT_INTERRUPTED = 0, 1, 2, 5, 130
DEVICES = ("cpu", "cuda")
LIST = "A,B"  # metavar of options that take several values in one word


class UsageError(Exception):
    """Bad input; the message is one line."""


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line: argparse would print the whole usage above it."""

    def error(self, message: str) -> NoReturn:
        self.exit(EXIT_USAGE, f"{self.prog}: {message}{self._commands(message)}; see {self.prog} --help\n")

    def _commands(self, message: str) -> str:
        """Where the subcommand is missing, which ones there are: argparse says only its metavar."""
        for action in self._actions:
            if isinstance(action, argparse._SubParsersAction) and message.endswith(f": {action.metavar}"):
                return f" (one of {', '.join(action.choices)})"
        return ""

    def parse_known_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> Any:  # type: ignore[override]
        """Refuse here what is unknown: argparse leaves that of a subcommand to the main parser, which does
        not know its options.
        """
        found, unknown = super().parse_known_args(args, namespace)
        if unknown:
            near = difflib.get_close_matches(unknown[0].partition("=")[0], self.names(), n=1)
            hint = f"; did you mean {near[0]}?" if near else self._list_hint(unknown[0])
            self.error(f"unrecognized arguments: {' '.join(unknown)}{hint}")
        return found, unknown

    def _list_hint(self, stray: str) -> str:
        """For ``--checks a b``: another option of ours takes its values with spaces."""
        lists = [action.option_strings[0] for action in self._actions if action.metavar == LIST]
        return f"; {lists[0]} takes several as {LIST}" if lists and not stray.startswith("-") else ""

    def names(self) -> frozenset[str]:
        """The options, as they are written."""
        return frozenset(self._option_string_actions)


def add_deadlines(parser: argparse.ArgumentParser) -> None:
    """``--timeout`` and ``--stall``, with the same environment twins as in pytest."""
    # argparse reads a default that is text as if it were given.
    for name, what in (
        ("timeout", "deadline of one launch"),
        ("stall", "hung when nothing moves for so long"),
    ):
        default = os.environ.get(f"GPUTRAIN_{name.upper()}") or None
        parser.add_argument(f"--{name}", type=seconds, default=default, metavar="SECONDS", help=what)


def add_place(parser: argparse.ArgumentParser, when: str = "") -> None:
    """``--capacity``, ``--device`` and ``--world-size``: what a batch size has to fit. ``when`` is said first
    where a command looks for one only then.
    """
    add = parser.add_argument
    text = 'memory to fit in, such as "80GB" (default: what is free)'
    add("--capacity", metavar="SIZE", help=f"{when}{text}")
    add("--device", type=device, help=f"{when}cpu or cuda (default: cuda where there is a GPU)")
    add("--world-size", type=positive, default=1, metavar="N", help="data-parallel ranks (default: 1)")


def flag_of(variable: str) -> bool:
    """A flag's environment twin; empty counts as not set. Raises UsageError."""
    text = os.environ.get(variable, "").strip()
    try:
        return bool(text) and parse_flag(text)
    except ValueError:
        raise UsageError(f"{variable}={text!r} is not legal; give {LEGAL_FLAG}") from None


def backend(text: str) -> str:
    """The name of a torch.compile backend; whether torch knows it is asked where torch is imported."""
    if not text.strip():
        raise argparse.ArgumentTypeError(
            "the name is empty; give a backend of torch.compile, such as aot_eager"
        )
    return text.strip()


def device(text: str) -> str:
    if text not in DEVICES:
        raise argparse.ArgumentTypeError(f"{text!r} is not legal; give {' or '.join(DEVICES)}")
    return text


def seconds(text: str) -> float:
    try:
        return parse_seconds(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not legal; give {LEGAL_SECONDS}") from None


def file(text: str) -> Path:
    path = Path(text)
    if path.is_dir():
        raise argparse.ArgumentTypeError(f"{text!r} is a folder; give a file, such as {path / 'out.json'}")
    if not path.absolute().parent.is_dir():
        raise argparse.ArgumentTypeError(f"{text!r} is not legal; give a file in a folder that is there")
    return path


def output_file(text: str) -> Path:
    """A file that can be written: tried now, so that hours of work do not end in an error."""
    path = file(text)
    there = path.exists()
    try:
        with path.open("ab"):
            pass
        if not there:
            path.unlink()
    except OSError as error:
        why = error.strerror or error
        raise argparse.ArgumentTypeError(f"{text!r} cannot be written ({why}); give another file") from None
    return path


def folder(text: str) -> Path:
    path = Path(text).expanduser()
    there = next(there for there in (path, *path.absolute().parents) if os.path.exists(there))
    if not there.is_dir():
        raise argparse.ArgumentTypeError(f"{text!r} is not legal; give a folder, there or not yet there")
    return path


def positive(text: str) -> int:
    if not text.strip().isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not legal; give a whole number of 1 or more")
    return int(text)


def ranks(text: str) -> int:
    if not text.strip().isdecimal() or int(text) < 2:  # data parallel with one rank would prove nothing
        raise argparse.ArgumentTypeError(f"{text!r} is not legal; give a number of ranks from 2 up")
    return int(text)
