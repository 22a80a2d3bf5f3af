"""Tests that need 1, 2, 4 and 8 of 8 GPUs under ``pytest -n 8``: how long until the last of them is done.

    python -m benchmarks.leases

The GPUs are pretended and the tests sleep, so this measures scheduling alone. Makespan is from the start of
the first test to the end of the last, without the start of the sessions. No way of running can be faster than
the lower bound: max(longest test, GPU-seconds / 8). The rivals, all with xdist's own scheduler:

* pinned: what suites do without leases: worker number modulo GPUs is the first GPU of a test, in one session.
  Nothing keeps two tests off the same GPU; how many pairs shared one is printed beside it.
* pinned, by size: a session a size, with as many workers as fit, so that no GPU is shared.
* one worker: ``pytest -n 0``.

The mixes are fixed lists, drawn once at random; "first run" knows no durations, "leases" those of that run.
"""

from __future__ import annotations

import itertools
import json
import random
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from benchmarks._harness import ROOT, options, report, run_command, scratch

GPUS = 8
LIMIT = 1.15
TIMEOUT = 300.0
SECONDS = (0.1, 0.6)
MIXES = {
    "mostly small": {1: 40, 2: 12, 4: 6, 8: 2},
    "each size as long": {1: 32, 2: 16, 4: 8, 8: 4},
}
QUICK = {"quick": {1: 4, 8: 1}}

SUITE = """\
import json
import time
from pathlib import Path

import pytest

MIX = json.loads(Path("mix.json").read_text())
ROWS = [
    pytest.param(n, seconds, id=f"size{n}-{number}", marks=pytest.mark.requires_gpus(n))
    for number, (n, seconds) in enumerate(MIX)
]


@pytest.mark.parametrize(("n", "seconds"), ROWS)
def test_sleep(n, seconds, held):
    start = time.time()
    time.sleep(seconds)
    with open("log", "a") as log:
        log.write(json.dumps([start, time.time(), held]) + "\\n")
"""

LEASED = """\
import pytest


@pytest.fixture
def held(gpus, n):
    assert len(gpus) == n
    return [gpu.index for gpu in gpus]
"""

PINNED = """\
import os

import pytest


def pytest_configure(config):
    config.addinivalue_line("markers", "requires_gpus(n): means nothing here")


@pytest.fixture
def held(n):
    worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0")[2:])
    first = worker * n if {by_size} else worker
    return [(first + number) % 8 for number in range(n)]
"""


class Outcome(NamedTuple):
    """Of one way to run a mix: seconds, and how many pairs of tests used a GPU at the same time."""

    makespan: float
    shared: int


def draw(sizes: dict[int, int]) -> list[tuple[int, float]]:
    """The tests of a mix as (GPUs, seconds), in an order of no meaning; the same ones every time."""
    rng = random.Random(2026)
    tests = [(n, round(rng.uniform(*SECONDS), 3)) for n, number in sizes.items() for _ in range(number)]
    rng.shuffle(tests)
    return tests


def lower_bound(tests: Sequence[tuple[int, float]]) -> float:
    """Seconds below which nobody can be done."""
    longest = max(seconds for _, seconds in tests)
    return max(longest, sum(n * seconds for n, seconds in tests) / GPUS)


class Suite:
    """One mix as a folder with a test file, run in one way."""

    def __init__(self, folder: Path, tests: Sequence[tuple[int, float]], conftest: str) -> None:
        self.folder, self.tests = folder, tests
        folder.mkdir(parents=True)
        (folder / "pytest.ini").write_text("[pytest]\n")
        (folder / "test_mix.py").write_text(SUITE)
        (folder / "conftest.py").write_text(conftest)
        (folder / "mix.json").write_text(json.dumps(tests))

    def run(self, workers: int, *arguments: str, size: int | None = None) -> Outcome:
        """Run pytest. Raises RuntimeError unless every test of that size, by default all, passed."""
        log = self.folder / "log"
        log.unlink(missing_ok=True)
        command = [sys.executable, "-m", "pytest", "-q", "-p", "xdist", "-n", str(workers), *arguments]
        command += [] if size is None else ["-k", f"size{size}-"]
        env = {
            "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
            "PYTHONPATH": str(ROOT),
            "PYTEST_ADDOPTS": None,
            "CUDA_VISIBLE_DEVICES": None,
            "GPUTRAIN_FAKE_GPUS": str(GPUS),
            "GPUTRAIN_LEASE_DIR": str(self.folder / "leases"),
        }
        done = run_command(command, timeout=TIMEOUT, cwd=self.folder, env=env)
        number = sum(size in (None, n) for n, _ in self.tests)
        if not re.search(rf"^{number} passed\b", done.stdout, re.MULTILINE):
            raise RuntimeError(f"not all of {number} tests passed:\n{done.stdout}{done.stderr}")
        return outcome([json.loads(line) for line in log.read_text().splitlines()])


def outcome(log: Sequence[tuple[float, float, list[int]]]) -> Outcome:
    """From (start, end, GPUs) of each test."""
    pairs = itertools.combinations(log, 2)
    shared = sum(a[0] < b[1] and b[0] < a[1] and not set(a[2]).isdisjoint(b[2]) for a, b in pairs)
    return Outcome(max(end for _, end, _ in log) - min(start for start, _, _ in log), shared)


def run_mix(folder: Path, tests: Sequence[tuple[int, float]]) -> dict[str, Outcome]:
    """Run a mix in every way."""
    leased = Suite(folder / "leased", tests, LEASED)
    pinned = Suite(folder / "pinned", tests, PINNED.format(by_size=False))
    by_size = Suite(folder / "by_size", tests, PINNED.format(by_size=True))
    ours = ("-p", "pytest_gputrain")
    first, known = leased.run(GPUS, *ours), leased.run(GPUS, *ours)
    parts = [by_size.run(GPUS // n, size=n) for n in sorted({n for n, _ in tests})]
    return {
        "leases": known,
        "leases, first run": first,
        "pinned": pinned.run(GPUS),
        "pinned, by size": Outcome(sum(part.makespan for part in parts), sum(part.shared for part in parts)),
        "one worker": pinned.run(0),
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and report. Returns 0 when the claim holds; a quick run only has to get to its end."""
    given = options(__doc__, argv)
    seconds: dict[str, list[float]] = {}
    figures: dict[str, float | int | str] = {"claim": f"leases within {LIMIT} of the lower bound"}
    worst = 0.0
    with scratch() as folder:
        for name, sizes in (QUICK if given.quick else MIXES).items():
            tests = draw(sizes)
            bound = lower_bound(tests)
            figures[f"{name}: tests, lower bound s"] = f"{len(tests)}, {bound:.2f}"
            for way, found in run_mix(folder / name.replace(" ", "-"), tests).items():
                seconds[f"{name}: {way}"] = [found.makespan]
                figures[f"{name}: {way}: of the lower bound"] = round(found.makespan / bound, 3)
                figures[f"{name}: {way}: pairs of tests on one GPU"] = found.shared
                if way.startswith("leases") and found.shared:
                    raise RuntimeError(f"{name}, {way}: {found.shared} pairs of tests held the same GPU")
            worst = max(worst, seconds[f"{name}: leases"][0] / bound)
    figures["claim_holds"] = str(worst <= LIMIT)
    report("leases", seconds, figures, results=given.results)
    return 0 if worst <= LIMIT or given.quick else 1


if __name__ == "__main__":
    sys.exit(main())
