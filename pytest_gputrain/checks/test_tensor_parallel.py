"""Tensor parallelism of a case: ``pytest --pyargs pytest_gputrain.checks --gputrain-case MODULE:ATTR``.

Two ranks each. Without a case, the embedded reference models; ``pytest_gputrain.reference.opt125m:case`` is
the full size. With ``--gputrain-report DIR`` the results are in ``NAME_test_report.txt`` there, with gradient
errors by layer and memory by rank.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from pytest_gputrain.checks.parametrize import BoundCheck
from pytest_gputrain.checks.tp_report import write_reports
from pytest_gputrain.plugin.settings import settings_of
from pytest_gputrain.plugin.shipped import parametrize
from pytest_gputrain.reference.text_case import with_text

if TYPE_CHECKING:
    from collections.abc import Iterator

    from pytest_gputrain.checks.result import CheckResult
    from pytest_gputrain.plugin.launcher import PytestLauncher

Results = dict[str, list["CheckResult"]]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    parametrize(metafunc, num_gpus=2)


@pytest.fixture(scope="module")
def results(request: pytest.FixtureRequest) -> Iterator[Results]:
    """What the checks of this module came to, by device; written as reports where the session keeps any."""
    gathered: Results = {}
    yield gathered
    folder = settings_of(request.config).report
    for device, found in gathered.items():
        if folder is not None:
            # A CPU's beside a GPU's, never in its place.
            write_reports(found, folder / f"tensor-parallel-{device}", device=device, world_size=2)


def judged(check: BoundCheck, launcher: PytestLauncher, results: Results) -> None:
    result = check.result(launcher=launcher)
    results.setdefault(check.ctx.device, []).append(result)
    check.told(result)


def test_tp_forward(check: BoundCheck, ddp_launcher: PytestLauncher, results: Results) -> None:
    judged(check, ddp_launcher, results)


def test_tp_backward(check: BoundCheck, ddp_launcher: PytestLauncher, results: Results) -> None:
    judged(check, ddp_launcher, results)


def test_tp_optimizers(check: BoundCheck, ddp_launcher: PytestLauncher, results: Results) -> None:
    judged(check, ddp_launcher, results)


def test_tp_memory(check: BoundCheck, ddp_launcher: PytestLauncher, results: Results) -> None:
    judged(check, ddp_launcher, results)


def test_tp_training(
    check: BoundCheck, ddp_launcher: PytestLauncher, results: Results, request: pytest.FixtureRequest
) -> None:
    """On the embedded models with real text, on a case of yours with its own data."""
    own = settings_of(request.config).cases
    case = check.case if own else with_text(check.case)
    result = check.result(case, launcher=ddp_launcher)
    results.setdefault(check.ctx.device, []).append(result)
    check.told(result)
