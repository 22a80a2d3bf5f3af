"""docs/tutorial.md, followed word by word in an empty folder: files are written, commands run.

A Python block begins with ``# FILE``, or ``# FILE, replace`` before one old and one new line. In a block of
commands each ``$ `` line is run; the lines under it must come in this order among those printed, seconds
aside, ``...`` standing for anything. ``[exit code N]`` ends a command that does not exit with 0.
"""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from tests.docs.test_examples import ROOT, environment

TUTORIAL = (ROOT / "docs" / "tutorial.md").read_text(encoding="utf-8")
PROGRAMS = {
    "gputrain": ["-m", "pytest_gputrain"],
    "pytest": [
        "-m",
        "pytest",
        "-c",
        "/dev/null",
        "--rootdir=.",
        "-p",
        "pytest_gputrain",
        "-p",
        "no:cacheprovider",
    ],
}


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_tutorial_is_true(tmp_path: Path) -> None:
    blocks = re.findall(r"^```(\w*)\n(.*?)^```$", TUTORIAL, re.MULTILINE | re.DOTALL)
    assert [language for language, _ in blocks].count("") == 5
    for language, text in blocks:
        if language == "python":
            write(tmp_path, text)
        else:
            follow(tmp_path, text)


def write(folder: Path, text: str) -> None:
    title, _, body = text.partition("\n")
    path = folder / title.removeprefix("# ").removesuffix(", replace")
    if title.endswith(", replace"):
        old, new = body.splitlines()
        before = path.read_text(encoding="utf-8")
        assert before.count(old) == 1, old
        body = before.replace(old, new)
    path.write_text(body, encoding="utf-8")


def follow(folder: Path, text: str) -> None:
    for part in text.split("$ ")[1:]:
        command, *shown = part.strip().splitlines()
        code = 0
        if found := re.fullmatch(r"\[exit code (\d+)\]", shown[-1]):
            code = int(found[1])
            shown.pop()
        program, *arguments = shlex.split(command)
        done = subprocess.run(
            [sys.executable, *PROGRAMS[program], *arguments], cwd=folder, env=environment(), timeout=400,
            check=False, capture_output=True, text=True, stdin=subprocess.DEVNULL,
        )  # fmt: skip
        printed = done.stdout.replace(f"{folder}/", "").splitlines()
        assert done.returncode == code, (command, printed, done.stderr)
        assert in_order(shown, printed), (command, shown, printed)


def in_order(shown: list[str], printed: list[str]) -> bool:
    left = iter(printed)
    return all(any(re.match(pattern(line), one) for one in left) for line in shown if line)


def pattern(line: str) -> str:
    """Of a line shown: its seconds may differ, and so may what pytest writes behind its dots."""
    parts = (
        [re.escape(part) for part in line.split("...")] if not line.startswith("test_") else [re.escape(line)]
    )
    return re.sub(r"(\\ )+\d+\\\.\d(\\ )+", r" +\\d+\\.\\d +", ".*".join(parts))


def test_pattern() -> None:
    assert re.match(
        pattern("net   check  passed   0.7  parameters 9, ..."), "net   check  passed  12.5  parameters 9, x"
    )
    assert not re.match(pattern("net  check  passed  0.7  x"), "net  check  failed  0.7  x")
