"""What the shipped test modules (``checks/test_*.py``) share: a (case, device) pair a test."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import pytest

from pytest_gputrain.checks.context import DEVICES, CheckContext
from pytest_gputrain.checks.parametrize import BoundCheck, expected_failure
from pytest_gputrain.plugin.cases import cases_of

if TYPE_CHECKING:
    from pytest_gputrain.case import TrainingCase

_WORLD_SIZE = 2


def parametrize(
    metafunc: pytest.Metafunc,
    *,
    num_gpus: int,
    more: Sequence[TrainingCase] = (),
    backend_on_cpu: str | None = None,
) -> None:
    """``test_ddp_parity(check)`` becomes ``test_ddp_parity[gpt-cpu]``, ``test_ddp_parity[gpt-cuda]``, …

    num_gpus: what the cuda test of each pair needs; it skips, and is selected by ``-m gpu``, by itself.
    more: cases beside the session's; backend_on_cpu: in the place of inductor.
    """
    if "check" not in metafunc.fixturenames:
        return
    check_id = metafunc.function.__name__.removeprefix("test_")
    rows = []
    for case in [*cases_of(metafunc.config), *more]:
        for device in DEVICES:
            backend = backend_on_cpu if device == "cpu" else None
            context = CheckContext(device=device, world_size=_WORLD_SIZE, compile_backend=backend)
            bound = BoundCheck(check_id, case, context)
            marks: list[Any] = [pytest.mark.requires_gpus(num_gpus)] if device == "cuda" else []
            rows.append(
                pytest.param(bound, id=f"{case.name}-{device}", marks=marks + expected_failure(bound))
            )
    metafunc.parametrize("check", rows)
