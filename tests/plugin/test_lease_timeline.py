"""Which test held which GPU when, as the report folder has it: also of tests whose worker died."""

from __future__ import annotations

import itertools
import json
from collections import defaultdict
from typing import Any

import pytest

from .conftest import Run

SUITE = """
import os, signal, time
import pytest

@pytest.mark.requires_gpus(1)
@pytest.mark.parametrize("number", range(4))
def test_one(number): time.sleep(0.05)

@pytest.mark.requires_gpus(2)
def test_two(): pass

@pytest.mark.requires_gpus(2)
def test_fails(): assert False

def test_none(): pass
"""


@pytest.fixture(autouse=True)
def _two_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GPUTRAIN_FAKE_GPUS", "2")


def bars(pytester: pytest.Pytester) -> list[dict[str, Any]]:
    """The bars of GPUs held, after a look at what a viewer needs of all of them."""
    document = json.loads((pytester.path / "report" / "leases.trace.json").read_text())
    events = document["traceEvents"]
    rows = {(e["pid"], e["tid"]) for e in events if e["ph"] == "M" and e["name"] == "thread_name"}
    groups = {e["args"]["name"]: e["pid"] for e in events if e["ph"] == "M" and e["name"] == "process_name"}
    assert set(groups) == {"GPUs held", "waiting for GPUs"}
    spans = [e for e in events if e["ph"] == "X"]
    assert all((e["pid"], e["tid"]) in rows and e["dur"] >= 0 for e in spans)
    return [e for e in spans if e["pid"] == groups["GPUs held"]]


def assert_no_overlap(held: list[dict[str, Any]]) -> None:
    by_gpu = defaultdict(list)
    for bar in held:
        by_gpu[bar["tid"]].append((bar["ts"], bar["ts"] + bar["dur"]))
    for times in by_gpu.values():
        times.sort()
        assert all(end <= start for (_, end), (start, _) in itertools.pairwise(times))


@pytest.mark.parametrize("workers", [[], ["-n", "2"]], ids=["alone", "xdist"])
def test_timeline(pytester: pytest.Pytester, run_each_way: Run, workers: list[str]) -> None:
    pytester.makepyfile(test_it=SUITE)
    run_each_way("--gputrain-report=report", *workers).assert_outcomes(passed=6, failed=1)
    held = bars(pytester)
    names = [bar["name"].removeprefix("test_it.py::test_") for bar in held]
    assert sorted(names) == ["fails", "fails", "one[0]", "one[1]", "one[2]", "one[3]", "two", "two"]
    assert {bar["args"]["outcome"] for bar in held if "fails" in bar["name"]} == {"failed"}
    assert {bar["args"]["worker"] for bar in held} <= ({"gw0", "gw1"} if workers else {"main"})
    assert_no_overlap(held)


def test_a_worker_that_died(pytester: pytest.Pytester, run_child: Run) -> None:
    pytester.makepyfile(
        test_it=SUITE
        + """
@pytest.mark.requires_gpus(2)
def test_dies(): os.kill(os.getpid(), signal.SIGKILL)
"""
    )
    result = run_child("--gputrain-report=report", "-n", "2")
    result.assert_outcomes(passed=6, failed=2)
    held = bars(pytester)
    assert [bar["args"]["outcome"] for bar in held if "dies" in bar["name"]] == ["worker died"] * 2
    assert len(held) == 10
    assert_no_overlap([bar for bar in held if "dies" not in bar["name"]])  # its end is when that was noticed


def test_without_leases_or_without_a_report_there_is_no_file(pytester: pytest.Pytester, run: Run) -> None:
    pytester.makepyfile(test_it="def test_none(): pass")
    run("--gputrain-report=report")
    assert not (pytester.path / "report" / "leases.trace.json").exists()
    pytester.makepyfile(test_it=SUITE)
    run()
    assert not list(pytester.path.rglob("*.trace.json"))


def test_a_file_that_cannot_be_written(pytester: pytest.Pytester, run: Run) -> None:
    pytester.makepyfile(
        """
        import pytest
        from pathlib import Path

        @pytest.mark.requires_gpus(2)
        def test_it(): Path("report", "leases.trace.json").mkdir(parents=True)
        """
    )
    result = run("--gputrain-report=report")
    result.assert_outcomes(passed=1)
    assert result.ret is pytest.ExitCode.OK
    result.stdout.fnmatch_lines(["gputrain: the lease timeline could not be written: *leases.trace.json'"])


def test_each_worker_runs_the_test(pytester: pytest.Pytester, run_child: Run) -> None:
    pytester.makepyfile("import pytest\n@pytest.mark.requires_gpus(2)\ndef test_it(): pass")
    run_child("-n", "2", "--dist", "each", "--gputrain-report=report").assert_outcomes(passed=2)
    held = bars(pytester)
    assert sorted(bar["args"]["worker"] for bar in held) == ["gw0", "gw0", "gw1", "gw1"]
    assert_no_overlap(held)
