"""A test more on ranks that are there: warm launches, and PyTorch's ``MultiProcContinuousTest``.

    python -m benchmarks.warm_launch

Twice: as bare calls in one process, and as tests under pytest, where the time of a test is what lies between
its end and that of the test before it, so that starting the ranks does not count. Interleaved.
"""

from __future__ import annotations

import itertools
import json
import re
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks._harness import ROOT, interleave, options, ratio, report, run_command, scratch
from benchmarks._rivals import WORLD_SIZE, all_reduce_once

CALLS, SUITES = 200, 5
FIRST, TESTS = 10, 200  # not counted, counted
TIMEOUT = 300.0
OURS, THEIRS = "warm launch", "MultiProcContinuousTest"

OUR_SUITE = """\
import pytest

from benchmarks._rivals import all_reduce_once


@pytest.mark.parametrize("number", range({tests}))
def test_all_reduce(ddp_launcher, number):
    ddp_launcher(all_reduce_once, world_size=2, isolation="warm")
"""

THEIR_SUITE = """\
from benchmarks import _continuous_case
from benchmarks._rivals import all_reduce_once


class SuiteTest(_continuous_case.MultiProcContinuousTest):
    world_size = 2
    backend_str = classmethod(lambda cls: "gloo")
    device_type = classmethod(lambda cls: "cpu")


def all_reduce(self):
    all_reduce_once()


for number in range({tests}):
    setattr(SuiteTest, f"test_all_reduce_{{number}}", all_reduce)
"""


def bare_calls(rounds: int) -> dict[str, list[float]]:
    """Seconds a call of each, the ranks already there."""
    from benchmarks import _continuous_case
    from pytest_gputrain import launch

    def ours() -> None:
        values = launch(all_reduce_once, world_size=WORLD_SIZE, isolation="warm").values
        assert values == [WORLD_SIZE] * WORLD_SIZE

    try:
        return interleave({OURS: ours, THEIRS: _continuous_case.run_test}, rounds, warm_up=5)
    finally:
        _continuous_case.end()
        launch.shutdown()  # type: ignore[attr-defined]


def write(folder: Path, text: str, tests: int) -> Path:
    """The folder of a suite of so many tests."""
    folder.mkdir()
    (folder / "pytest.ini").write_text("[pytest]\npython_classes = SuiteTest\n")
    (folder / "test_suite.py").write_text(text.format(tests=tests))
    return folder


def run_suite(folder: Path, tests: int, *plugins: str) -> list[float]:
    """Run pytest; seconds of each test but the first few. Raises RuntimeError unless every test passed."""
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-q", "-p", "benchmarks._test_times"]
    for plugin in plugins:
        command += ["-p", plugin]
    when_done = folder / "when_done.json"
    env = {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "PYTHONPATH": str(ROOT), "PYTEST_ADDOPTS": None}
    done = run_command(command, timeout=TIMEOUT, cwd=folder, env={**env, "WHEN_DONE": str(when_done)})
    if not re.search(rf"^{tests} passed\b", done.stdout, re.MULTILINE):
        raise RuntimeError(f"not every test of {folder} passed:\n{done.stdout}")
    times = json.loads(when_done.read_text(encoding="utf-8"))[FIRST:]
    return [later - earlier for earlier, later in itertools.pairwise(times)]


def under_pytest(folder: Path, rounds: int, tests: int) -> dict[str, list[float]]:
    """Seconds of each test of each."""
    ours = write(folder / "ours", OUR_SUITE, tests)
    theirs = write(folder / "theirs", THEIR_SUITE, tests)
    seconds: dict[str, list[float]] = {OURS: [], THEIRS: []}
    for _ in range(rounds):
        seconds[OURS] += run_suite(ours, tests, "pytest_gputrain")
        seconds[THEIRS] += run_suite(theirs, tests)
    return seconds


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and report. Returns 1 if a test more costs more than with PyTorch's, either way."""
    given = options(__doc__, argv)
    calls = bare_calls(20 if given.quick else CALLS)
    with scratch() as folder:
        count = FIRST + (10 if given.quick else TESTS)
        tests = under_pytest(folder, 1 if given.quick else SUITES, count)
    seconds = {f"{name}, a call": runs for name, runs in calls.items()}
    seconds |= {f"{name}, a test under pytest": runs for name, runs in tests.items()}
    ratios = {"a call": ratio(calls, THEIRS, OURS), "a test": ratio(tests, THEIRS, OURS)}
    figures = {f"times faster, {name}": value for name, value in ratios.items()}
    figures["calls a second"] = 1 / statistics.median(calls[OURS])
    report("warm_launch", seconds, figures, results=given.results)
    return 0 if given.quick or min(ratios.values()) >= 1 else 1


if __name__ == "__main__":
    sys.exit(main())
