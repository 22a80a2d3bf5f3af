"""The log of one branch: a header, what its ranks printed, a footer with exit code and duration."""

from __future__ import annotations

import datetime
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from pytest_gputrain.sweep.results import BranchResult

if TYPE_CHECKING:
    from pytest_gputrain.launch import LaunchResult

RULE = "=" * 80


def start(path: Path, *, branch: str, config: str, command: str, launched: Path) -> None:
    """Write the header. launched: the folder that has the ranks' output while they run."""
    lines = [
        RULE,
        f"branch:  {branch}",
        f"command: {command}",
        f"start:   {now()}",
        f"output:  {launched}/*/rank*/stdout.log while it runs, then here",
        "configuration:",
        *(f"    {line}" for line in config.splitlines() if line and not line.startswith("#")),
        RULE,
        "",
    ]
    path.write_text("\n".join(lines), encoding="utf-8")


def finish(path: Path, outcome: BranchResult, launched: Path, result: LaunchResult | None) -> None:
    """Add the output, what the launch says of it where it did not pass, and the footer."""
    parts = [text for name in ("stdout", "stderr") for text in _printed(launched, name)]
    if result is not None and not result.passed:
        parts += ["--- what the launch says", result.summary(printed=False)]
    why = [f"why:      {outcome.message}"] if outcome.message else []
    code = "none" if outcome.exit_code is None else outcome.exit_code
    footer = [
        RULE,
        f"end:      {now()}",
        f"verdict:  {outcome.verdict}",
        f"exit code: {code}",
        f"duration: {outcome.duration:.1f} s",
        *why,
        *(f"note:     {note}" for note in outcome.notes),
        RULE,
    ]
    with path.open("a", encoding="utf-8", errors="replace") as file:
        file.write("\n".join([*parts, *footer]) + "\n")


def printed_by_first(launched: Path) -> str:
    """What rank 0 printed."""
    return "\n".join(_texts(launched, "rank0", "stdout"))


def remove(launched: Path) -> None:
    """Remove the launch's files, which are in the log now."""
    shutil.rmtree(launched, ignore_errors=True)


def now() -> str:
    """This moment, with the offset from UTC."""
    return datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")


def _printed(launched: Path, name: str) -> Sequence[str]:
    """Each rank's stream under its heading; those of the agent, torchrun's own, too."""
    found = []
    for folder in sorted(launched.glob("*/rank*")) + sorted(launched.glob("*/agent*")):
        text = "\n".join(_texts(launched, folder.name, name))
        if text.strip():
            found += [f"--- {folder.name} {name}", text.rstrip("\n")]
    return found


def _texts(launched: Path, rank: str, name: str) -> list[str]:
    from pytest_gputrain.launch import output

    return [output.read(path) for path in sorted(launched.glob(f"*/{rank}/{name}.log"))]
