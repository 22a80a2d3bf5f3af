"""The shipped tests of the compiled training script: they pass as they are, and each is able to fail."""

from __future__ import annotations

import pytest

from tests.planted.plug_broken_compile import PLANTED
from tests.plugin.conftest import ROOT, Run, _no_settings_of_the_caller

pytestmark = [
    pytest.mark.skipif("sys.platform != 'linux'", reason="launching ranks needs Linux"),
    pytest.mark.timeout(1200),
]
__all__ = ["_no_settings_of_the_caller"]
MODULE = str(ROOT / "pytest_gputrain" / "checks" / "test_compiled_training.py")
ON_EACH_DEVICE = len(PLANTED) - 1


@pytest.fixture
def run_child(pytester: pytest.Pytester) -> Run:
    plugins = [part for name in ("xdist", "timeout", "pytest_gputrain") for part in ("-p", name)]
    return lambda *arguments: pytester.runpytest_subprocess(*plugins, MODULE, "-n0", *arguments, timeout=1100)


@pytest.mark.slow
def test_all_pass(run_child: Run) -> None:
    """With generated code once."""
    result = run_child("-rs")
    result.assert_outcomes(passed=ON_EACH_DEVICE + 1, skipped=ON_EACH_DEVICE)


@pytest.mark.nightly
def test_each_is_able_to_fail(run_child: Run) -> None:
    result = run_child("-p", "tests.planted.plug_broken_compile", "-k", "not cuda")
    planted = [(test, name) for test, names in PLANTED.items() for name in names]
    cuda = len(planted) - len(PLANTED["test_inductor_on_a_cpu"])
    result.assert_outcomes(failed=len(planted), deselected=cuda)
    for test, name in planted:
        result.stdout.fnmatch_lines_random(f"FAILED *{test}?*{name}?*")
