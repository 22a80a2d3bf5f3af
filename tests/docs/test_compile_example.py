"""The failure that docs/compile.md shows is the one that a reader gets."""

from __future__ import annotations

import re

import pytest

from .test_examples import EXAMPLES, ROOT, pytest_here

PAGE = (ROOT / "docs" / "compile.md").read_text()
NAME = "test_stays_compiled.py"


def test_the_program_is_the_one_that_runs() -> None:
    program = (EXAMPLES / NAME).read_text()
    assert program[program.index("class Model") :].strip() in PAGE


@pytest.mark.slow
def test_the_failure() -> None:
    done = pytest_here("--rootdir=.", "-p", "no:logging", NAME)
    assert done.returncode == 1
    shown = [line for line in done.stdout.splitlines() if line.startswith("E  ")]
    for line in shown[:4]:
        assert _without_seconds(line[1:].strip()) in _without_seconds(PAGE)


def _without_seconds(text: str) -> str:
    return re.sub(r"in \d+\.\d s", "in N s", text)
