"""Where does data-parallel training stop? The phase plan: ``pytest --pyargs pytest_gputrain.checks``.

On the embedded model with three attention branches, or with ``--gputrain-case MODULE:ATTR`` on yours. Two
ranks; the cuda test needs two GPUs, or one that they share (``--share-gpu``), and then says so. The whole
report is in the folder that the failure names, kept with ``--gputrain-report``.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from pytest_gputrain.checks.context import DEVICES
from pytest_gputrain.plugin import properties
from pytest_gputrain.plugin.cases import cases_of
from pytest_gputrain.plugin.settings import settings_of

if TYPE_CHECKING:
    from pytest_gputrain.case import TrainingCase
    from pytest_gputrain.plugin.launcher import PytestLauncher


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    from pytest_gputrain.reference.sparse_attention import case as three_branches

    cases = cases_of(metafunc.config) if settings_of(metafunc.config).cases else [three_branches]
    rows = [
        pytest.param(
            case,
            device,
            id=f"{case.name}-{device}",
            marks=[pytest.mark.requires_gpus(2)] if device == "cuda" else [],
        )
        for case in cases
        for device in DEVICES
    ]
    metafunc.parametrize(("case", "device"), rows)


def test_ddp_hang(
    case: TrainingCase,
    device: str,
    ddp_launcher: PytestLauncher,
    tmp_path: Path,
    request: pytest.FixtureRequest,
) -> None:
    from pytest_gputrain.diagnose.cases import diagnose_case
    from pytest_gputrain.launch import LaunchUsageError
    from pytest_gputrain.launch.request import linux

    try:
        linux()
    except LaunchUsageError as error:
        pytest.skip(str(error))
    out = (ddp_launcher.defaults.artifacts or tmp_path) / "diagnose"
    report = diagnose_case(case, out, ddp_launcher.defaults)
    for label in report.shared_gpu:
        properties.add(request.node, properties.SHARED, label)
    if report.verdict != "PASS":
        pytest.fail(f"{report.text()}\n  report: {out}/SUMMARY.md", pytrace=False)
