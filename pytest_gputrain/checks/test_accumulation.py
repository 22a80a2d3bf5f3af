"""Gradient accumulation of a case: ``pytest --pyargs pytest_gputrain.checks --gputrain-case MODULE:ATTR``.

One process for the gradients, two ranks for the schedule. Without a case, the embedded reference models.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pytest_gputrain.checks.parametrize import BoundCheck
from pytest_gputrain.plugin.shipped import parametrize

if TYPE_CHECKING:
    import pytest

    from pytest_gputrain.plugin.launcher import PytestLauncher


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    parametrize(metafunc, num_gpus=2)


def test_accumulation_parity(check: BoundCheck, ddp_launcher: PytestLauncher) -> None:
    check(launcher=ddp_launcher)


def test_accumulation_schedule(check: BoundCheck, ddp_launcher: PytestLauncher) -> None:
    check(launcher=ddp_launcher)
