"""Fifty tests of two ranks, five ways: the suite's time, and what a kill in the tenth does to the others.

    python -m benchmarks.suite_50_tests

Every suite is written as files into a temporary folder and run by ``pytest`` as a user would run it, with
pytest-timeout as the last resort. The two slow ways run once, with the kill, which costs them no time.
"""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from benchmarks._harness import ROOT, interleave, options, report, run_command, scratch

TESTS, QUICK_TESTS = 50, 6
ROUNDS = 3
TEST_TIMEOUT = 60
TIMEOUT = 590.0
KILLED = "one killed"

_OURS = """\
import pytest
from benchmarks._rivals import all_reduce_once, is_killed


@pytest.mark.parametrize("number", range({tests}))
def test_ranks(ddp_launcher, number):
    work = is_killed if number == {killed} else all_reduce_once
    ddp_launcher(work, world_size=2, isolation="{isolation}")
"""

_CONTINUOUS = """\
from benchmarks import _continuous_case
from benchmarks._rivals import all_reduce_once, is_killed


class SuiteTest(_continuous_case.MultiProcContinuousTest):
    world_size = 2
    backend_str = classmethod(lambda cls: "gloo")
    device_type = classmethod(lambda cls: "cpu")


for number in range({tests}):
    work = is_killed if number == {killed} else all_reduce_once
    setattr(SuiteTest, f"test_{{number:02}}", lambda self, work=work: work() and None)
"""

_SPAWN = """\
import pytest
from benchmarks import _rivals


class SuiteTest:
    @pytest.mark.parametrize("number", range({tests}))
    def test_ranks(self, number):
        _rivals.spawn_processes(_rivals.is_killed if number == {killed} else _rivals.all_reduce_once)
"""

_TORCHRUN = """\
import pathlib
import subprocess
import sys

import pytest

SCRIPT = pathlib.Path(__file__).with_name("script.py")


@pytest.mark.parametrize("number", range({tests}))
def test_ranks(number):
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2"]
    command += ["--rdzv-backend=c10d", "--rdzv-endpoint=127.0.0.1:0"]
    command += [str(SCRIPT), str(int(number == {killed}))]
    done = subprocess.run(command, capture_output=True, text=True, timeout=50)
    assert done.returncode == 0, done.stderr
"""

SCRIPT = """\
import sys

import torch.distributed as dist
from benchmarks._rivals import all_reduce_once, is_killed

dist.init_process_group("gloo")
is_killed() if sys.argv[1] == "1" else all_reduce_once()
dist.destroy_process_group()
"""

WARM, FRESH = "warm", "fresh"
CONTINUOUS, SPAWN, TORCHRUN = "MultiProcContinuousTest", "DeepSpeed-style class", "torchrun in subprocess"
SUITES = {WARM: _OURS, FRESH: _OURS, CONTINUOUS: _CONTINUOUS, SPAWN: _SPAWN, TORCHRUN: _TORCHRUN}
QUICK_WAYS = (WARM, FRESH, CONTINUOUS)


def write(folder: Path, way: str, tests: int, killed: int) -> Path:
    """One suite; ``killed`` is the number of the test in which a rank is killed, -1 for none."""
    folder.mkdir()
    (folder / "pytest.ini").write_text(f"[pytest]\npython_classes = SuiteTest\ntimeout = {TEST_TIMEOUT}\n")
    (folder / "test_suite.py").write_text(SUITES[way].format(tests=tests, killed=killed, isolation=way))
    (folder / "script.py").write_text(SCRIPT)
    return folder


def run_suite(folder: Path, way: str, killed: bool) -> dict[str, int]:
    """Run pytest and return how many tests came to which outcome. Raises RuntimeError if it hangs."""
    command = [sys.executable, "-m", "pytest", "-p", "timeout", "-p", "no:cacheprovider", "-q"]
    command += ["-p", "pytest_gputrain"] if way in (WARM, FRESH) else []
    env = {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "PYTHONPATH": str(ROOT), "PYTEST_ADDOPTS": None}
    done: subprocess.CompletedProcess[str]
    done = run_command(command, timeout=TIMEOUT, cwd=folder, env=env, expect=int(killed))
    last = done.stdout.strip().splitlines()[-1]
    return {word: int(count) for count, word in re.findall(r"(\d+) (passed|failed|skipped|error)", last)}


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and report. Returns 1 if a kill did anything to other tests of ours."""
    given = options(__doc__, argv)
    tests = QUICK_TESTS if given.quick else TESTS
    tenth = min(9, tests // 2)
    outcomes: dict[str, dict[str, int]] = {}
    with scratch() as folder:
        healthy = {
            way: partial(run_suite, write(folder / f"healthy-{number}", way, tests, -1), way, killed=False)
            for number, way in enumerate(QUICK_WAYS)
        }
        seconds = interleave(healthy, 1 if given.quick else ROUNDS, warm_up=0)
        for number, way in enumerate(SUITES):
            place = write(folder / f"killed-{number}", way, tests, tenth)

            def with_a_kill(place: Path = place, way: str = way) -> None:
                outcomes[way] = run_suite(place, way, killed=True)

            seconds |= interleave({f"{way}, {KILLED}": with_a_kill}, 1, warm_up=0)
    figures: dict[str, float | int | str] = {"tests": tests, "ranks a test": 2}
    for way, counts in outcomes.items():
        figures[f"{way}: of the {tests - 1} others, with a kill in test {tenth + 1}"] = (
            f"{counts.get('passed', 0)} passed, {tests - 1 - counts.get('passed', 0)} did not"
        )
    report("suite_50_tests", seconds, figures, ours=WARM, results=given.results)
    return 0 if all(outcomes[way].get("passed") == tests - 1 for way in (WARM, FRESH)) else 1


if __name__ == "__main__":
    sys.exit(main())
