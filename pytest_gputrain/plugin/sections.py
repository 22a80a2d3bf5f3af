"""What ranks printed, as sections of a report: shown where pytest shows captured output, and in JUnit."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Literal

import pytest

if TYPE_CHECKING:
    from pytest_gputrain.launch import LaunchResult

_STREAMS = ("stdout", "stderr")


def add_rank_sections(
    item: pytest.Item, result: LaunchResult, when: Literal["setup", "call", "teardown"] = "call"
) -> None:
    """Add a section a rank and stream: ``Captured stdout of rank 0 call``; none for what stayed empty.

    pytest decides who sees them, as for its own captured output: ``-rP``, ``--show-capture`` and
    ``junit_logging`` work. Under ``-s`` the text goes to the terminal instead, a mark before each line.
    """
    captured = item.config.getoption("capture") != "no"
    for rank in result.ranks:
        for name in _STREAMS:
            text: str = getattr(rank, name)
            if not text.strip():
                continue
            if captured:
                # JUnit joins all sections whose title starts with "Captured stdout", and drops the titles.
                item.add_report_section(when, f"{name} of rank {rank.rank}", f"[rank {rank.rank}]\n{text}")
            else:
                lines = text.rstrip("\n").split("\n")
                stream = getattr(sys, name)
                stream.write("".join(f"[rank {rank.rank}] {line}\n" for line in lines))
                stream.flush()
