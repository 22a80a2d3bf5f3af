"""The shipped DDP-hang module: the phase plan as a test, on the three-branch model or on the user's case."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.plugin.conftest import ROOT, Run, _no_settings_of_the_caller, run, run_with_torch, torch_is_there

pytestmark = pytest.mark.skipif("sys.platform != 'linux'", reason="launching ranks needs Linux")
__all__ = ["_no_settings_of_the_caller", "run", "run_with_torch", "torch_is_there"]
MODULE = str(ROOT / "pytest_gputrain" / "checks" / "test_ddp_hang.py")


def test_the_three_branch_model_passes(run_with_torch: Run, tmp_path: Path) -> None:
    result = run_with_torch(MODULE, "-v", "--gputrain-report", str(tmp_path))
    result.assert_outcomes(passed=1, skipped=1)
    result.stdout.fnmatch_lines_random(
        [
            "*test_ddp_hang?sparse-attention-cpu? PASSED*",
            "*test_ddp_hang?sparse-attention-cuda? SKIPPED*",
        ]
    )
    (summary,) = tmp_path.rglob("SUMMARY.md")
    for branch in ("compressed", "selected", "sliding"):
        assert f"| [branch:{branch}](" in summary.read_text()


@pytest.mark.slow
def test_a_broken_case_fails_with_the_cause_and_the_advice(run_with_torch: Run, tmp_path: Path) -> None:
    case = "tests.planted.diagnosed:one_branch_hangs"
    result = run_with_torch(MODULE, "--gputrain-case", case, "--gputrain-report", str(tmp_path), "-k", "cpu")
    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(
        [
            "HANG in ddp_one_step: *diagnosed.py:*",
            "how that was decided:",
            "*of the branches run alone only branch narrow failed*",
            "*report: */diagnose/SUMMARY.md",
        ]
    )
