"""What docs/reference.md says of the command line, made from the parsers: `python -m tests.docs.reference`
writes it into the page, and a test compares.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

from pytest_gputrain.cli import _parser
from pytest_gputrain.plugin.settings_table import SETTINGS

PAGE = Path(__file__).parents[2] / "docs" / "reference.md"
BEGIN, END = "<!-- made by python -m tests.docs.reference -->\n", "<!-- end -->"


def made() -> str:
    """Options of pytest and of every command."""
    return "\n".join((*_pytest(), *_commands(_parser())))


def _pytest() -> Iterator[str]:
    yield "### pytest\n\n| option | environment | ini | |\n|---|---|---|---|"
    for one in SETTINGS:
        option = f"{one.option} {one.metavar or ''}".strip()
        yield f"| `{option}` | `{one.variable}` | `{one.name}` | {one.description} |"
    yield ""


def _commands(parser: argparse.ArgumentParser) -> Iterator[str]:
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for command in action.choices.values():
                yield from _command(command)
                yield from _commands(command)


def _command(parser: argparse.ArgumentParser) -> Iterator[str]:
    options = [action for action in parser._actions if action.help != argparse.SUPPRESS]
    if any(isinstance(action, argparse._SubParsersAction) for action in options):
        return
    yield f"### {parser.prog}\n\n{parser.description}\n"
    if parser.epilog:
        yield f"{parser.epilog}\n"
    yield "| option | |\n|---|---|"
    yield from (f"| {_written(action)} | {_told(action)} |" for action in options if action.dest != "help")
    yield ""


def _written(action: argparse.Action) -> str:
    metavar = action.metavar if isinstance(action.metavar, str) else action.dest.upper()
    if action.choices:
        metavar = " or ".join(map(str, action.choices))
    takes = f" {metavar}" if action.nargs != 0 else ""
    names = ", ".join(action.option_strings)
    return f"`{names}{takes}`" if names else f"`{metavar}`"


def _told(action: argparse.Action) -> str:
    return " ".join((action.help or "").split()).replace("|", "\\|").replace("%%", "%")


def put_in(text: str) -> str:
    """The page with what is made in its place."""
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n{made()}\n{END}{after}"


if __name__ == "__main__":
    PAGE.write_text(put_in(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
