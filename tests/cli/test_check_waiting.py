"""The line of `gputrain check` on a terminal: what it waits for, gone before the table goes on."""

from __future__ import annotations

import time

import pytest

from pytest_gputrain.cli import check_waiting
from pytest_gputrain.cli.check_waiting import Waiting
from pytest_gputrain.endurance.progress import WIDTH, Screen


def test_a_check_that_takes_long_has_a_line_that_goes_away(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(check_waiting, "SOON", 0.0)
    monkeypatch.setattr(check_waiting, "EVERY", 0.01)
    written: list[str] = []
    line = Waiting(Screen(written.append, in_place=True))
    line.at("gpt compile_parity")
    deadline = time.monotonic() + 30
    while not written and time.monotonic() < deadline:
        time.sleep(0.01)
    line.over()
    assert written[0].startswith("\rgpt compile_parity: ")
    assert written[0].rstrip().endswith(" s")
    assert written[-1] == "\r" + " " * WIDTH + "\r"
    line.close()


def test_where_no_terminal_is_nothing_is_written() -> None:
    written: list[str] = []
    line = Waiting(Screen(written.append, in_place=False))
    line.at("gpt compile_parity")
    line.close()
    Waiting(None).close()
    assert not written
