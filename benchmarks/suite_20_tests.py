"""Twenty tests of two ranks under ``pytest -n 2``: with ``ddp_launcher``, and with torchrun in subprocess.

    python -m benchmarks.suite_20_tests

Both suites are written as files into a temporary folder and run as a user would run them; the time is that
of the whole ``pytest`` command. Ours includes starting a fork server in each of the two workers.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks._harness import ROOT, interleave, options, ratio, report, run_command, scratch

ROUNDS = 3
TESTS = 20
QUICK_TESTS = 4
TIMEOUT = 590.0
OURS, THEIRS = "ddp_launcher", "torchrun in subprocess"

OUR_SUITE = """\
import pytest


def all_reduce(number):
    import torch
    import torch.distributed as dist

    tensor = torch.full((1,), float(number))
    dist.all_reduce(tensor)
    assert tensor.item() == 2 * number


@pytest.mark.parametrize("number", range({tests}))
def test_all_reduce(ddp_launcher, number):
    ddp_launcher(all_reduce, number, world_size=2)
"""

THEIR_SUITE = """\
import pathlib
import subprocess
import sys

import pytest

SCRIPT = pathlib.Path(__file__).with_name("all_reduce.py")


@pytest.mark.parametrize("number", range({tests}))
def test_all_reduce(number):
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2"]
    command += ["--rdzv-backend=c10d", "--rdzv-endpoint=127.0.0.1:0", str(SCRIPT), str(number)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
"""

SCRIPT = """\
import sys

import torch
import torch.distributed as dist

dist.init_process_group("gloo")
number = int(sys.argv[1])
tensor = torch.full((1,), float(number))
dist.all_reduce(tensor)
assert tensor.item() == 2 * number
dist.destroy_process_group()
"""


def write(folder: Path, tests: int) -> tuple[Path, Path]:
    """Our suite and theirs, each in a folder of its own with an empty pytest.ini."""
    made = []
    for name, suite in (("ours", OUR_SUITE), ("theirs", THEIR_SUITE)):
        place = folder / name
        place.mkdir()
        (place / "pytest.ini").write_text("[pytest]\n")
        (place / "test_suite.py").write_text(suite.format(tests=tests))
        made.append(place)
    (made[1] / "all_reduce.py").write_text(SCRIPT)
    return made[0], made[1]


def run_suite(folder: Path, tests: int, *plugins: str) -> None:
    """Run pytest with two workers. Raises RuntimeError unless every test passed."""
    command = [sys.executable, "-m", "pytest", "-n", "2", "-p", "xdist", "-p", "no:cacheprovider", "-q"]
    for plugin in plugins:
        command += ["-p", plugin]
    env = {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "PYTHONPATH": str(ROOT), "PYTEST_ADDOPTS": None}
    done = run_command(command, timeout=TIMEOUT, cwd=folder, env=env)
    if not re.search(rf"^{tests} passed\b", done.stdout, re.MULTILINE):
        raise RuntimeError(f"not every test of {folder.name} passed:\n{done.stdout}")


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and report. Returns 0: there is no claim but that both suites are green."""
    given = options(__doc__, argv)
    tests = QUICK_TESTS if given.quick else TESTS
    with scratch() as folder:
        ours, theirs = write(folder, tests)
        ways = {
            OURS: lambda: run_suite(ours, tests, "pytest_gputrain"),
            THEIRS: lambda: run_suite(theirs, tests),
        }
        seconds = interleave(ways, 1 if given.quick else ROUNDS, warm_up=0)
    faster = ratio(seconds, THEIRS, OURS)
    figures = {"tests": tests, "ranks a test": 2, "workers": 2, "times faster": faster}
    report("suite_20_tests", seconds, figures, ours=OURS, results=given.results)
    return 0


if __name__ == "__main__":
    sys.exit(main())
