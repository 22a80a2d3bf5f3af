"""A test more on ranks that are there: warm launches, and PyTorch's ``MultiProcContinuousTest``.

    python -m benchmarks.warm_launch

Twice: as bare calls in one process, and as tests under pytest, where the time of a test is the difference
between a suite of many and a suite of few, so that starting the ranks does not count. Interleaved.
"""

from __future__ import annotations

import re
import statistics
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from benchmarks._harness import ROOT, interleave, options, ratio, report, run_command, scratch
from benchmarks._rivals import WORLD_SIZE, all_reduce_once

CALLS, SUITES = 200, 5
FEW, MANY = 10, 210
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


def write(folder: Path, text: str, few: int, many: int) -> tuple[Path, Path]:
    """The suite with few tests, and with many."""
    made = []
    for tests in (few, many):
        place = folder / str(tests)
        place.mkdir(parents=True)
        (place / "pytest.ini").write_text("[pytest]\npython_classes = SuiteTest\n")
        (place / "test_suite.py").write_text(text.format(tests=tests))
        made.append(place)
    return made[0], made[1]


def run_suite(folder: Path, *plugins: str) -> None:
    """Run pytest. Raises RuntimeError unless every test passed."""
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-q"]
    for plugin in plugins:
        command += ["-p", plugin]
    env = {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "PYTHONPATH": str(ROOT), "PYTEST_ADDOPTS": None}
    done = run_command(command, timeout=TIMEOUT, cwd=folder, env=env)
    if not re.search(rf"^{folder.name} passed\b", done.stdout, re.MULTILINE):
        raise RuntimeError(f"not every test of {folder} passed:\n{done.stdout}")


def under_pytest(folder: Path, rounds: int, few: int, many: int) -> dict[str, list[float]]:
    """Seconds a test more of each, one figure a round."""
    ways: dict[str, Callable[[], object]] = {}
    for name, text, plugins in ((OURS, OUR_SUITE, ("pytest_gputrain",)), (THEIRS, THEIR_SUITE, ())):
        for size, place in zip(("few", "many"), write(folder / name, text, few, many), strict=True):
            ways[f"{name}, {size}"] = partial(run_suite, place, *plugins)
    seconds = interleave(ways, rounds, warm_up=0)
    return {
        name: [
            (more - less) / (many - few)
            for more, less in zip(seconds[f"{name}, many"], seconds[f"{name}, few"], strict=True)
        ]
        for name in (OURS, THEIRS)
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and report. Returns 1 if a test more costs more than with PyTorch's, either way."""
    given = options(__doc__, argv)
    calls = bare_calls(20 if given.quick else CALLS)
    with scratch() as folder:
        many = FEW + 10 if given.quick else MANY
        tests = under_pytest(folder, 1 if given.quick else SUITES, FEW, many)
    seconds = {f"{name}, a call": runs for name, runs in calls.items()}
    seconds |= {f"{name}, a test more under pytest": runs for name, runs in tests.items()}
    ratios = {"a call": ratio(calls, THEIRS, OURS), "a test": ratio(tests, THEIRS, OURS)}
    figures = {f"times faster, {name}": value for name, value in ratios.items()}
    figures["calls a second"] = 1 / statistics.median(calls[OURS])
    report("warm_launch", seconds, figures, results=given.results)
    return 0 if given.quick or min(ratios.values()) >= 1 else 1


if __name__ == "__main__":
    sys.exit(main())
