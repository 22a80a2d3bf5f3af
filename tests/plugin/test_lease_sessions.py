"""Whole sessions with leases: workers killed in the middle of launches, and any number of workers."""

from __future__ import annotations

import os
import re
import uuid
from importlib.util import find_spec
from pathlib import Path

import pytest

from pytest_gputrain.devices.inventory import parse_fake
from pytest_gputrain.devices.lease_folder import LeaseFolder
from pytest_gputrain.devices.lease_place import Request
from pytest_gputrain.devices.leases import acquire
from tests.launch.test_nothing_survives import MARK, marked, wait_until

from .conftest import Run

# Each test kills its own worker once its ranks, each with a child in a session of its own, are all there.
KILLED = """
import os, signal, subprocess, threading, time
from pathlib import Path
import pytest

def hang(folder):
    subprocess.Popen(["sleep", "1234"], start_new_session=True)
    (Path(folder) / os.environ["RANK"]).touch()
    time.sleep(1000)

def kill_when_ready(folder):
    while not all((folder / str(rank)).exists() for rank in range(2)):
        time.sleep(0.02)
    os.kill(os.getpid(), signal.SIGKILL)

@pytest.mark.parametrize("number", range({times}))
@pytest.mark.requires_gpus(4)
def test_killed(ddp_launcher, tmp_path, number):
    threading.Thread(target=kill_when_ready, args=(tmp_path,), daemon=True).start()
    ddp_launcher(hang, tmp_path, device="cpu", timeout=200)

@pytest.mark.parametrize("number", range(2))
@pytest.mark.requires_gpus(2)
def test_after(number): pass
"""


@pytest.mark.skipif("sys.platform != 'linux'", reason="launching ranks needs Linux")
@pytest.mark.timeout(600)  # twenty workers and fork servers, one after the other
@pytest.mark.parametrize("times", [2, pytest.param(20, marks=pytest.mark.nightly)])
def test_sigkill_of_a_worker_in_the_middle_of_a_launch(
    pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch, times: int
) -> None:
    mark = uuid.uuid4().hex
    monkeypatch.setenv(MARK, mark)
    monkeypatch.setenv("GPUTRAIN_FAKE_GPUS", "8")
    pytester.makepyfile(KILLED.replace("{times}", str(times)))
    plugins = [part for name in ("xdist", "pytest_gputrain") for part in ("-p", name)]
    options = ["-n", "2", f"--max-worker-restart={times + 5}", "--gputrain-lease-timeout=120"]
    result = pytester.runpytest_subprocess(*plugins, *options, timeout=560)
    result.assert_outcomes(passed=2, failed=times)  # each of them once, and the session went on
    assert len([line for line in result.outlines if "crashed while running" in line]) >= times
    assert wait_until(lambda: not marked(mark), 30), marked(mark)
    folder = LeaseFolder(Path(os.environ["GPUTRAIN_LEASE_DIR"]))
    acquire(folder, Request(8, parse_fake("8").gpus, "afterwards"), deadline=30).release()


OUTCOMES = """
import pytest

@pytest.mark.parametrize("number", range(8))
@pytest.mark.parametrize("n", [1, 2, 4, 8])
def test_sizes(n, number, request): assert number != 5

@pytest.fixture
def broken(): raise RuntimeError

@pytest.mark.requires_gpus(2)
def test_error(broken): pass

@pytest.mark.requires_gpus(9)
def test_impossible(): pass

@pytest.mark.requires_gpus(4)
@pytest.mark.xfail(strict=True)
def test_xfail(): assert False

@pytest.mark.requires_gpus(8)
def test_skips(): pytest.skip("here")

class TestGroup:
    @pytest.mark.requires_gpus(4)
    def test_a(self, gpus): assert len(gpus) == 4
    def test_b(self, gpu_count): assert gpu_count == 8
"""
MARKS = """
import pytest

def pytest_collection_modifyitems(items):
    for item in items:
        if "test_sizes" in item.nodeid:
            item.add_marker(pytest.mark.requires_gpus(item.callspec.params["n"]))
"""


@pytest.mark.slow
def test_the_same_results_with_any_number_of_workers_in_any_order(
    pytester: pytest.Pytester, run_child: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GPUTRAIN_FAKE_GPUS", "8")
    pytester.makeconftest(MARKS)
    pytester.makepyfile(test_it=OUTCOMES)
    orders: list[list[str]] = [[]]
    if find_spec("pytest_randomly"):
        orders += [["-p", "randomly", f"--randomly-seed={seed}"] for seed in (1, 2)]
    results = {
        (workers, *options): outcomes(run_child("-n", workers, "-rA", *options))
        for workers in ("0", "2", "4")
        for options in orders
    }
    first = results[("0",)]
    assert len(first) == 38
    for how, found in results.items():
        assert found == first, how


def outcomes(result: pytest.RunResult) -> dict[str, str]:
    found = {}
    for line in result.outlines:
        if match := re.match(r"(PASSED|FAILED|ERROR|XFAIL) (test_it\.py::\S+)", line):
            found[match[2]] = match[1]
        elif match := re.match(r"SKIPPED \[1\] (\S+: .*)", line):
            found[match[1]] = "SKIPPED"
    return found
