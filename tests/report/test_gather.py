"""From records to a report: nothing is green without having run, whatever became of the processes."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from pytest_gputrain.report.gather import gather
from pytest_gputrain.report.model import Report
from pytest_gputrain.report.reading import ReportError
from pytest_gputrain.report.records import Recorder, read_records

from .records_made import Session, a_test


def report_of(folder: Path) -> Report:
    return gather(read_records(folder))


def test_a_session_that_passed(tmp_path: Path) -> None:
    session = Session(tmp_path).line("collected", ids=["a", "b"])
    session.run(a_test("a"), a_test("b", "skipped", message="no luck")).end(outcomes=2)
    report = report_of(tmp_path)
    assert (report.verdict, report.session.complete, report.session.ending) == ("passed", True, "finished")
    assert [(one.reason, one.count, one.tests) for one in report.not_run] == [("no luck", 1, ("b",))]
    assert (report.totals.passed, report.totals.skipped, report.totals.seconds) == (1, 1, 2.0)
    assert report.session.started == "2001-09-09T01:46:41+00:00"


@pytest.mark.parametrize(
    ("tests", "exit_code", "verdict"),
    [
        ([], 5, "nothing_ran"),
        ([a_test("a", "skipped")], 0, "nothing_ran"),
        ([a_test("a"), a_test("b", "failed")], 1, "failed"),
        ([a_test("a", "error")], 1, "failed"),
        ([a_test("a")], 1, "failed"),  # by --require-gpus, or another plugin
    ],
    ids=["none", "skipped", "failed", "error", "exit-code"],
)
def test_what_is_not_green(
    tmp_path: Path, tests: list[dict[str, object]], exit_code: int, verdict: str
) -> None:
    Session(tmp_path).run(*tests).end(exit_code)
    assert report_of(tmp_path).verdict == verdict


def test_an_interrupted_session(tmp_path: Path) -> None:
    session = Session(tmp_path).line("collected", ids=["a", "b", "c"]).run(a_test("a")).line("start", id="b")
    session.end(2, interrupted=True, reason="interrupted (Ctrl-C)")
    report = report_of(tmp_path)
    assert (report.verdict, report.session.ending) == ("interrupted", "interrupted")
    assert [(one.reason, one.tests) for one in report.not_run] == [
        ("never begun: interrupted (Ctrl-C)", ("c",)),
        ("did not finish: interrupted (Ctrl-C)", ("b",)),
    ]


def test_a_killed_session_names_what_it_ran(tmp_path: Path) -> None:
    Session(tmp_path).run(a_test("a")).line("start", id="b")
    report = report_of(tmp_path)
    assert (report.verdict, report.session.ending, report.session.ended) == ("incomplete", "killed", None)
    assert [(test.id, test.outcome) for test in report.tests] == [("a", "passed"), ("b", "crashed")]


def test_a_worker_that_died(tmp_path: Path) -> None:
    main = Session(tmp_path)
    Session(tmp_path, "gw0").run(a_test("a", worker="gw0")).line("start", id="b", kind="test")
    Session(tmp_path, "gw1").run(a_test("c", worker="gw1")).end(outcomes=1)
    main.line("crash", id="b", worker="gw0").end(1, workers=["gw0", "gw1"])
    report = report_of(tmp_path)
    assert (report.verdict, report.session.ending) == ("failed", "worker_died")
    assert [(test.id, test.worker) for test in report.tests if test.outcome == "crashed"] == [("b", "gw0")]
    assert "worker gw0 ended without a word" in report.session.notes


def test_missing_and_shortened_files_are_no_pass(tmp_path: Path) -> None:
    Session(tmp_path).run(a_test("a")).end(workers=["gw0"], outcomes=2)
    report = report_of(tmp_path)
    assert report.verdict == "incomplete"
    assert report.session.notes == (
        "the records of worker gw0 are missing",
        "node1-main-s1.jsonl: 1 outcomes are there, its process wrote 2",
    )


def test_a_last_line_that_was_cut_off(tmp_path: Path) -> None:
    session = Session(tmp_path).run(a_test("a"), a_test("b")).end(outcomes=2)
    text = session.path.read_text()
    session.path.write_text(text[:-10])
    report = report_of(tmp_path)
    assert report.verdict == "incomplete"
    assert report.session.notes == ("node1-main-s1.jsonl: its last line was cut off and is left out",)


def test_a_corrupt_line_in_the_middle(tmp_path: Path) -> None:
    session = Session(tmp_path).run(a_test("a")).end()
    lines = session.path.read_text().splitlines(keepends=True)
    session.path.write_text("".join([lines[0], lines[1][:12] + "\n", *lines[2:]]))
    with pytest.raises(ReportError) as caught:
        read_records(tmp_path)
    assert str(caught.value) == (
        f"{session.path}: line 2 is corrupt, and it is not the last one: the file was damaged after it was "
        "written; remove that line to go on without what it told"
    )


def test_records_of_another_version(tmp_path: Path) -> None:
    session = Session(tmp_path)
    session.path.write_text(session.path.read_text().replace('"version": 1', '"version": 7'))
    with pytest.raises(ReportError) as caught:
        read_records(tmp_path)
    assert str(caught.value) == (
        f"{session.path}: its first line is 'begin' of version 7; this reads 'begin' of version 1: "
        "use the gputrain that wrote it"
    )


def test_the_session_written_to_last_is_reported(tmp_path: Path) -> None:
    Session(tmp_path, session="old").run(a_test("a", "failed")).end(1)
    Session(tmp_path, session="new", at=2e9).run(a_test("a")).end()
    report = report_of(tmp_path)
    assert (report.session.id, report.verdict) == ("new", "passed")
    assert "left out" in report.session.notes[0]


def test_collection_errors_of_several_workers_are_one(tmp_path: Path) -> None:
    broken = a_test("test_x.py", "error", message="could not be collected: SyntaxError")
    main = Session(tmp_path)
    for worker in ("gw0", "gw1"):
        Session(tmp_path, worker).line("done", test=broken, collecting=True).end(outcomes=1)
    main.end(2, interrupted=True, workers=["gw0", "gw1"])
    report = report_of(tmp_path)
    assert (report.verdict, len(report.tests)) == ("failed", 1)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ('{"event": "done", "at": "now", "test": {}}', "line 2 is corrupt, and it is not the last one"),
        ('{"event": "done", "at": 1}', "line 2 (done) lacks 'test'; remove that line"),
        ('{"event": "start", "at": 1, "id": 3}', "line 2 (start) lacks 'id'; remove that line"),
    ],
)
def test_a_line_that_nobody_wrote_is_named(tmp_path: Path, line: str, said: str) -> None:
    session = Session(tmp_path)
    session.path.write_text(f"{session.path.read_text()}{line}\n")
    with pytest.raises(ReportError, match=re.escape(f"{session.path}: {said}")) as caught:
        read_records(tmp_path)
    assert "\n" not in str(caught.value)


def test_what_a_power_cut_leaves_at_the_end_of_a_file(tmp_path: Path) -> None:
    session = Session(tmp_path).run(a_test("a"))
    with session.path.open("ab") as file:
        file.write(bytes(4096))
    report = report_of(tmp_path)
    assert report.verdict == "incomplete"
    assert report.session.notes[0].endswith("its last line was cut off and is left out")


@pytest.mark.skipif("not __import__('pathlib').Path('/dev/full').exists()", reason="needs /dev/full")
def test_a_full_disk_ends_the_records_and_nothing_else(tmp_path: Path) -> None:
    recorder = Recorder(tmp_path, "host", "main")
    recorder.line("begin", at=1.0)
    recorder.close()
    recorder._file = open("/dev/full", "w")  # noqa: SIM115  # the recorder closes it
    recorder.line("start", at=2.0, id="a")
    recorder.line("done", at=3.0, test={})
    assert (recorder.closed, "No space left on device" in recorder.broken) == (True, True)
    recorder.close()
