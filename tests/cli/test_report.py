"""``gputrain report`` and ``gputrain check --report``."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pytest_gputrain.cli import main
from pytest_gputrain.report.files import load
from tests.report.nights_made import speed
from tests.report.records_made import Session, a_test

CASE = """
import torch
from pytest_gputrain import TrainingCase
line = TrainingCase(
    name="line", model=lambda: torch.nn.Linear(4, 1), batch=lambda n, device: torch.randn(n, 4),
    loss=lambda model, batch: model(batch).square().mean(),
)
"""


def written(folder: Path, document: dict[str, object]) -> str:
    folder.mkdir()
    (folder / "report.json").write_text(json.dumps(document))
    return str(folder)


def test_a_killed_session_is_reported_afterwards(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    session = Session(tmp_path).run(a_test("t.py::test_a"))
    session.line("start", id="t.py::test_b", kind="test")
    assert main(["report", str(tmp_path)]) == 1
    assert "incomplete" in capsys.readouterr().out
    found = load(tmp_path)
    assert {test.id: test.outcome for test in found.tests} == {
        "t.py::test_a": "passed",
        "t.py::test_b": "crashed",
    }
    assert (tmp_path / "index.html").is_file()


def test_two_are_compared(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, tokens in (("old", 1000.0), ("new", 500.0)):
        test = a_test("gpt::stable_training", metrics={"tokens_per_second": speed(tokens)})
        Session(tmp_path / name, session=name).run({**test, "case": "gpt"}).end(outcomes=1)
    old, new = str(tmp_path / "old"), str(tmp_path / "new")
    assert main(["report", old, new]) == 1
    assert "tokens_per_second" in capsys.readouterr().out
    assert main(["report", new, old]) == 0


def test_several_are_merged(tmp_path: Path) -> None:
    for name in ("a", "b"):
        Session(tmp_path / name, session=name).run(a_test("t.py::test_a")).end(outcomes=1)
    parts = [str(tmp_path / name) for name in ("a", "b")]
    assert main(["report", "--merge", str(tmp_path / "all"), *parts]) == 0
    assert [test.id for test in load(tmp_path / "all").tests] == ["t.py::test_a"] * 2


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["nowhere"], "nowhere cannot be read (No such file or directory)"),
        ([], "0 folders given; give DIR, OLD NEW, --merge OUT DIR DIR or --nights DIR DIR"),
        (["--merge", "out"], "--merge out: give OUT and the folders to merge after it: --merge OUT DIR DIR"),
    ],
)
def test_bad_input_is_one_line(
    arguments: list[str],
    line: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["report", *arguments]) == 2
    assert capsys.readouterr().err == f"gputrain report: {line}\n"


def test_another_version_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = written(tmp_path / "old", {"schema": "gputrain.report", "version": 7})
    assert main(["report", folder]) == 2
    assert "is of version 7 of the report, this reads version 1" in capsys.readouterr().err


def test_checks_leave_a_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "reported_case.py").write_text(CASE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    arguments = [
        "check",
        "reported_case:line",
        "--checks",
        "gradients_arrive,tp_forward",
        "--report",
        "night",
    ]
    assert main(arguments) == 0
    found = load(tmp_path / "night")
    assert [(test.id, test.outcome) for test in found.tests] == [
        ("line::gradients_arrive", "passed"),
        ("line::tp_forward", "skipped"),
    ]
    assert found.session.complete
    assert main([*arguments, "--baseline", "night"]) == 2  # its report is what this run would write over
