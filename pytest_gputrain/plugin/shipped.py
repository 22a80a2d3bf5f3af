"""What the shipped test modules (``checks/test_*.py``) share: a (case, device) pair a test."""

from __future__ import annotations

from typing import Any

import pytest

from pytest_gputrain.checks.context import DEVICES, CheckContext
from pytest_gputrain.checks.parametrize import BoundCheck, expected_failure
from pytest_gputrain.plugin.cases import cases_of

_WORLD_SIZE = 2


def parametrize(metafunc: pytest.Metafunc, *, num_gpus: int) -> None:
    """``test_ddp_parity(check)`` becomes ``test_ddp_parity[gpt-cpu]``, ``test_ddp_parity[gpt-cuda]``, …

    num_gpus: what the cuda test of each pair needs; it skips, and is selected by ``-m gpu``, by itself.
    """
    if "check" not in metafunc.fixturenames:
        return
    check_id = metafunc.function.__name__.removeprefix("test_")
    rows = []
    for case in cases_of(metafunc.config):
        for device in DEVICES:
            bound = BoundCheck(check_id, case, CheckContext(device=device, world_size=_WORLD_SIZE))
            marks: list[Any] = [pytest.mark.requires_gpus(num_gpus)] if device == "cuda" else []
            rows.append(
                pytest.param(bound, id=f"{case.name}-{device}", marks=marks + expected_failure(bound))
            )
    metafunc.parametrize("check", rows)
