"""``--gputrain-report``: every test of a session is in its report, however the session ends."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import pytest

from pytest_gputrain.report.files import load
from pytest_gputrain.report.model import Report, Test
from pytest_gputrain.report.schema import published

from .conftest import Run

ALL_KINDS = """
import pytest

def test_passes(): pass
def test_fails(): assert 1 == 2
@pytest.mark.skip(reason="no luck")
def test_skips(): pass
@pytest.mark.xfail(reason="known")
def test_expected(): assert 0
@pytest.mark.xfail(reason="known", strict=False)
def test_unexpected(): pass
@pytest.fixture
def broken(): raise ValueError("fixture broke")
def test_setup(broken): pass
@pytest.fixture
def torn():
    yield
    raise RuntimeError("tear broke")
def test_teardown(torn): pass
@pytest.mark.requires_gpus(2)
def test_gpus(): pass
"""

LAUNCHES = """
import pytest
from pytest_gputrain import TrainingCase, parametrize_with_checks
import torch
import torch.distributed as dist

def uneven():
    if dist.get_rank() == 1:
        raise ValueError("boom")
    dist.barrier()

def test_launch(ddp_launcher): ddp_launcher(uneven)
def test_two(ddp_launcher):
    ddp_launcher(print, "hello")
    assert not ddp_launcher(uneven, check=False).passed
@pytest.mark.distributed(world_size=2)
def test_body(rank): assert rank == 0

def model(): return torch.nn.Linear(4, 1)
def batch(size, device): return torch.randn(size, 4, device=device)
def loss(model, batch): return model(batch).pow(2).mean()
def frozen():
    made = model()
    made.bias = torch.nn.Parameter(torch.zeros(1))
    made.unused = torch.nn.Parameter(torch.zeros(3))
    return made
good = TrainingCase(name="good", model=model, batch=batch, loss=loss)
bad = TrainingCase(name="bad", model=frozen, batch=batch, loss=loss)

@parametrize_with_checks([good, bad], checks=["gradients_arrive", "tp_forward"])
def test_training(case, check): check(case)
"""

ENDS = """
import os, signal
import pytest

def test_a(): pass
def test_b():
    what = os.environ["WHAT"]
    if what == "exit": pytest.exit("enough")
    if what == "_exit": os._exit(3)
    if what == "fail": assert False
    os.kill(os.getpid(), getattr(signal, what))
    signal.pause()
def test_c(): pass
"""


def report_in(folder: Path) -> Report:
    """What a session wrote, which holds to the published schema."""
    document = json.loads((folder / "report.json").read_text())
    if (jsonschema := _jsonschema()) is not None:
        jsonschema.Draft202012Validator(published()).validate(document)
    assert (folder / "summary.md").is_file()
    assert (folder / "index.html").is_file()
    return load(folder)


def _jsonschema() -> Any:
    try:
        import jsonschema
    except ImportError:
        return None
    return jsonschema


def by_name(report: Report) -> dict[str, Test]:
    return {test.id.rpartition("::")[2].removeprefix("test_"): test for test in report.tests}


@pytest.mark.parametrize("workers", [[], ["-n", "2"]], ids=["alone", "xdist"])
def test_every_kind_of_test_is_in_it(
    pytester: pytest.Pytester, run: Run, run_child: Run, workers: list[str]
) -> None:
    pytester.makepyfile(test_it=ALL_KINDS)
    started = (run_child if workers else run)("--gputrain-report=kept", "-k", "not nothing", *workers)
    started.stdout.fnmatch_lines(
        ["gputrain: report */kept/index.html: failed: 1 failed, 2 error, 2 passed, *"]
    )
    report = report_in(pytester.path / "kept")
    assert (report.verdict, report.session.complete, report.session.exit_code) == ("failed", True, 1)
    assert report.session.workers == (("gw0", "gw1") if workers else ())
    tests = by_name(report)
    outcomes = {name: test.outcome for name, test in tests.items()}
    assert outcomes == {
        "passes": "passed", "fails": "failed", "skips": "skipped", "expected": "skipped",
        "unexpected": "passed", "setup": "error", "teardown": "error", "gpus": "skipped",
    }  # fmt: skip
    lines = {name: test.headline for name, test in tests.items() if test.message}
    assert lines["fails"].startswith("assert 1 == 2   at ")
    assert lines["skips"] == "no luck"
    assert lines["expected"].startswith("expected failure (known): assert 0")
    assert lines["setup"].startswith("in setup: ValueError: fixture broke   at ")
    assert lines["teardown"].startswith("in teardown: RuntimeError: tear broke   at ")
    assert lines["gpus"].startswith("needs 2 GPUs, found 0")
    assert tests["unexpected"].labels == ("passed unexpectedly",)
    assert {one.reason.partition(" ")[0] for one in report.not_run} >= {"no", "needs", "expected"}
    [machine] = report.machines
    assert machine.torch
    assert f"torch {machine.torch}" in machine.label


@pytest.mark.skipif("sys.platform != 'linux'", reason="launching ranks needs Linux")
def test_launches_and_checks_are_told(pytester: pytest.Pytester, run_with_torch: Run) -> None:
    pytester.makepyfile(test_it=LAUNCHES)
    run_with_torch("--gputrain-report=kept", "--junitxml=out.xml")
    folder = pytester.path / "kept"
    report = report_in(folder)
    tests = by_name(report)
    [launch] = tests["launch"].launches
    assert (launch.verdict, launch.cause and launch.cause.rank) == ("FAILED", 1)
    assert tests["launch"].headline.startswith("FAILED after ")
    assert "ValueError: boom" in tests["launch"].headline
    assert "ValueError: boom" in (launch.ranks[1].stack or "")
    assert launch.artifacts is not None
    assert (folder / launch.artifacts / "rank1").is_dir()
    assert [one.verdict for one in tests["two"].launches] == ["PASSED", "FAILED"]
    assert (tests["two"].outcome, tests["body"].kind, tests["body"].outcome) == ("passed", "launch", "failed")
    checks = {(test.case, test.check): test for test in report.tests if test.kind == "check"}
    assert checks["good", "gradients_arrive"].outcome == "passed"
    failed = checks["bad", "gradients_arrive"]
    assert (failed.outcome, failed.device) == ("failed", "cpu")
    assert "unused" in failed.headline
    assert failed.figures
    assert checks["good", "tp_forward"].outcome == "skipped"
    junit_agrees(pytester.path / "out.xml", by_name(report))


def junit_agrees(path: Path, tests: dict[str, Test]) -> None:
    cases = {
        case.attrib["name"].removeprefix("test_"): case for case in ElementTree.parse(path).iter("testcase")
    }
    assert cases.keys() == tests.keys()
    for name, test in tests.items():
        told = [(one.attrib["name"], one.attrib["value"]) for one in cases[name].iter("property")]
        assert dict(told)["gputrain_outcome"] == test.outcome
        kinds = {child.tag for child in cases[name]} & {"failure", "error", "skipped"}
        assert kinds == ({"failed": {"failure"}, "skipped": {"skipped"}}.get(test.outcome) or set())
    told = [(one.attrib["name"], one.attrib["value"]) for one in cases["launch"].iter("property")]
    assert dict(told)["gputrain_verdict"] == "FAILED"
    assert "ValueError: boom" in dict(told)["gputrain_cause"]


def session(pytester: pytest.Pytester, what: str, *arguments: str) -> int:
    """A session of three tests of which the second ends it; its exit code."""
    pytester.makepyfile(test_it=ENDS)
    plugins = ["-p", "xdist", "-p", "pytest_gputrain", "--gputrain-report=kept"]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *plugins, *arguments],
        cwd=pytester.path,
        env={**os.environ, "WHAT": what},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=120,
    )
    print(done.stdout, done.stderr)
    return done.returncode


@pytest.mark.skipif("sys.platform != 'linux'", reason="sends signals")
@pytest.mark.parametrize(
    ("what", "code", "reason"),
    [("SIGINT", 2, "interrupted (Ctrl-C)"), ("SIGTERM", 143, "terminated (SIGTERM)"), ("exit", 2, "enough")],
)
def test_an_interrupted_session_has_a_report(
    pytester: pytest.Pytester, what: str, code: int, reason: str
) -> None:
    assert session(pytester, what) == code
    report = report_in(pytester.path / "kept")
    assert (report.verdict, report.session.reason) == ("interrupted", reason)
    assert [test.id for test in report.tests] == ["test_it.py::test_a"]
    assert [(one.reason, one.tests) for one in report.not_run] == [
        (f"never begun: {reason}", ("test_it.py::test_c",)),
        (f"did not finish: {reason}", ("test_it.py::test_b",)),
    ]


def test_the_first_failure_ends_the_session(pytester: pytest.Pytester) -> None:
    assert session(pytester, "fail", "-x") == 1
    report = report_in(pytester.path / "kept")
    assert report.verdict == "failed"
    assert [(one.reason, one.count) for one in report.not_run] == [
        ("never begun: stopping after 1 failures", 1)
    ]


@pytest.mark.skipif("sys.platform != 'linux'", reason="sends signals")
def test_a_killed_session_is_reported_afterwards(
    pytester: pytest.Pytester, capsys: pytest.CaptureFixture[str]
) -> None:
    from pytest_gputrain.cli import main

    folder = pytester.path / "kept"
    folder.mkdir()
    (folder / "report.json").write_text("of an earlier session, which passed")
    assert session(pytester, "SIGKILL") == -signal.SIGKILL
    assert [path.name for path in folder.iterdir()] == ["records"]
    assert main(["report", str(folder)]) == 1
    assert "incomplete: 1 crashed, 1 passed" in capsys.readouterr().out
    report = report_in(folder)
    assert (report.verdict, report.session.ending) == ("incomplete", "killed")
    assert [test.id for test in report.tests if test.outcome == "crashed"] == ["test_it.py::test_b"]


def test_a_worker_that_dies_has_its_test_named(pytester: pytest.Pytester) -> None:
    assert session(pytester, "_exit", "-n", "1") == 1
    report = report_in(pytester.path / "kept")
    assert (report.verdict, report.session.ending) == ("failed", "worker_died")
    tests = by_name(report)
    assert {name: test.outcome for name, test in tests.items()} == {
        "a": "passed", "b": "crashed", "c": "passed",
    }  # fmt: skip
    assert tests["b"].worker == "gw0"


@pytest.mark.parametrize("workers", [[], ["-n", "1"]], ids=["alone", "xdist"])
def test_nothing_ran(pytester: pytest.Pytester, run: Run, run_child: Run, workers: list[str]) -> None:
    pytester.makepyfile("import pytest\n@pytest.mark.skip(reason='no luck')\ndef test_it(): pass")
    assert (run_child if workers else run)("--gputrain-report=kept", *workers).ret == 0
    report = report_in(pytester.path / "kept")
    assert (report.verdict, report.not_run[0].reason) == ("nothing_ran", "no luck")


def test_missing_gpus_and_what_cannot_be_collected_are_told(pytester: pytest.Pytester, run: Run) -> None:
    pytester.makepyfile(test_broken="import nowhere_to_be_found", test_fine="def test_it(): pass")
    run("--gputrain-report=kept")
    report = report_in(pytester.path / "kept")
    assert report.verdict == "failed"
    [broken] = report.tests
    assert (broken.id, broken.outcome) == ("test_broken.py", "error")
    assert "No module named 'nowhere_to_be_found'" in broken.headline
    assert run("--gputrain-report=kept", "--require-gpus=2").ret == 1
    report = report_in(pytester.path / "kept")
    assert (report.verdict, report.tests) == ("interrupted", ())
    assert "--require-gpus 2: needs 2 GPUs, found 0" in (report.session.reason or "")


def test_without_a_session_there_is_no_report(pytester: pytest.Pytester, run: Run) -> None:
    pytester.makepyfile("def test_it(): pass")
    run("--gputrain-report=kept", "--collect-only")
    run("--gputrain-report=kept", "--fixtures")
    assert not (pytester.path / "kept").exists()


def test_a_session_inside_of_a_test_keeps_to_itself(
    pytester: pytest.Pytester, run_child: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both were given the same folder, by the environment; the outer one's report is there in the end."""
    pytester.makepyfile(
        test_it="""
        pytest_plugins = ["pytester"]
        def test_outer(pytester):
            pytester.makepyfile("def test_inner(): pass")
            pytester.runpytest_inprocess("-p", "pytest_gputrain").assert_outcomes(passed=1)
        """
    )
    monkeypatch.setenv("GPUTRAIN_REPORT", str(pytester.path / "kept"))
    run_child().assert_outcomes(passed=1)
    report = report_in(pytester.path / "kept")
    assert [test.id for test in report.tests] == ["test_it.py::test_outer"]
    assert report.verdict == "passed"
