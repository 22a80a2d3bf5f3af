"""The five programs on which PyTorch's MultiProcessTestCase is green though a rank died or skipped."""

from __future__ import annotations

import os
import signal
import unittest
from collections.abc import Callable

import pytest

from pytest_gputrain import launch
from pytest_gputrain.launch import Verdict


def rank() -> int:
    return int(os.environ["RANK"])


def leaves_with_7() -> None:
    if rank() == 1:
        os._exit(7)


def is_killed() -> None:
    if rank() == 1:
        os.kill(os.getpid(), signal.SIGKILL)


def faults() -> None:
    if rank() == 1:
        os.kill(os.getpid(), signal.SIGSEGV)


def skips() -> None:
    if rank() == 1:
        raise unittest.SkipTest("only here")


def skips_while_another_leaves() -> None:
    if rank() == 0:
        raise unittest.SkipTest("only here")
    os._exit(7)


@pytest.mark.parametrize(
    ("program", "verdict"),
    [
        (leaves_with_7, Verdict.CRASHED),
        (is_killed, Verdict.CRASHED),
        (faults, Verdict.CRASHED),
        (skips, Verdict.FAILED),
        (skips_while_another_leaves, Verdict.CRASHED),
    ],
)
def test_is_not_green_here(program: Callable[[], None], verdict: Verdict) -> None:
    result = launch(program, timeout=20, check=False)
    assert result.verdict is verdict
    assert result.cause is not None and result.cause.rank == 1
