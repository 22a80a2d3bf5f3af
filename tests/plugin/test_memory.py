"""The fixture ``oom_guard`` in a session: the figures in the report, under xdist too."""

from __future__ import annotations

import pytest

from tests.plugin.conftest import Run

TESTS = """
    import torch
    from pytest_gputrain import OutOfMemory

    def test_fits(oom_guard):
        with oom_guard("1MiB") as guard:
            torch.zeros(1000)
        assert guard.peak_bytes == 4000
        guard.assert_nothing_left()
        assert not torch.cuda.is_initialized()

    def test_does_not_fit(oom_guard):
        with oom_guard("1KB"):
            torch.zeros(1000)

    def test_no_size(oom_guard):
        with oom_guard("1 parsec"):
            pass
"""


def test_the_figures_are_in_the_report(pytester: pytest.Pytester, run_child: Run) -> None:
    pytester.makepyfile(TESTS)
    result = run_child("-n1", "-rP", "--junitxml=junit.xml", "-o", "junit_logging=all")
    result.assert_outcomes(passed=1, failed=2)
    result.stdout.fnmatch_lines_random(
        [
            "*Captured oom_guard call*",
            "peak 3.9 KiB on cpu, limit 1.0 MiB: other 3.9 KiB",
            "E*OutOfMemory: out of memory on cpu: aten.zeros.default needs 3.9 KiB with 0 bytes in use, "
            "of a limit of 1000 bytes, at test_the_figures_are_in_the_report.py:13 in test_does_not_fit*",
        ]
    )
    # The failures end at the user's line, not inside of this package.
    result.stdout.fnmatch_lines(["test_the_figures_are_in_the_report.py:13: OutOfMemory"])
    result.stdout.fnmatch_lines(["E*ValueError: '1 parsec' is not a size*", "", "*_report.py:16: ValueError"])
    assert 'name="gputrain_peak_memory" value="peak 3.9 KiB' in (pytester.path / "junit.xml").read_text()
