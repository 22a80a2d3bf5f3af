"""The shipped stability tests: they pass as they are, and fail where the size found is not used."""

from __future__ import annotations

import pytest

from pytest_gputrain.checks.test_stability import DEPTHS
from tests.plugin.conftest import ROOT, Run, _no_settings_of_the_caller

__all__ = ["_no_settings_of_the_caller"]
MODULE = str(ROOT / "pytest_gputrain" / "checks" / "test_stability.py")
pytestmark = [
    pytest.mark.skipif("sys.platform != 'linux'", reason="launching ranks needs Linux"),
    pytest.mark.slow,
    pytest.mark.timeout(600),
]


@pytest.fixture
def run_child(pytester: pytest.Pytester) -> Run:
    plugins = [part for name in ("xdist", "timeout", "pytest_gputrain") for part in ("-p", name)]
    return lambda *arguments: pytester.runpytest_subprocess(*plugins, MODULE, "-n0", *arguments, timeout=500)


def test_a_depth_trains_at_the_size_found(run_child: Run) -> None:
    result = run_child("--stability", "-k", "at_depth and 12-cpu")
    result.assert_outcomes(passed=1, deselected=2 * len(DEPTHS) + 3)


def test_twice_the_size_found_runs_out_of_memory(run_child: Run) -> None:
    result = run_child("--stability", "-k", "at_depth and 12-cpu", "-p", "tests.planted.plug_broken_depth")
    result.assert_outcomes(failed=1, deselected=2 * len(DEPTHS) + 3)
    result.stdout.fnmatch_lines_random("*OutOfMemory*give it a smaller batch*")
