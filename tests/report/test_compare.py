"""Two reports side by side."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from pytest_gputrain.report.compare import compare
from pytest_gputrain.report.nights import read_nights
from pytest_gputrain.report.reading import ReportError, load_report
from tests.report.nights_made import entry, report, speed


def kinds(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    return [change.kind for change in compare(old, new).changes]


@pytest.mark.parametrize(
    ("was", "now", "kind"),
    [
        ("passed", "failed", "worse"),
        ("passed", "error", "worse"),
        ("skipped", "crashed", "worse"),
        ("passed", "skipped", "worse"),
        ("failed", "skipped", "worse"),
        ("failed", "passed", "better"),
        ("skipped", "passed", "better"),
        ("failed", "failed", "same"),
        ("passed", "passed", "same"),
    ],
)
def test_verdicts(was: str, now: str, kind: str) -> None:
    assert kinds(report(entry(outcome=was)), report(entry(outcome=now), day=29)) == [kind]


def test_what_is_said() -> None:
    old = report(entry(), entry(check="ddp_parity"), entry(check="tp_memory"))
    new = report(
        entry(outcome="skipped", message="needs 2 GPUs"),
        entry(check="ddp_parity", outcome="failed", message="gradients are 2 x\nlikely: a sum"),
        entry(check="tp_forward"),
        day=29,
    )
    assert str(compare(old, new)).splitlines() == [
        "compared with the report of 2026-11-28, 4d1c2ab: 3 worse, 1 new (0 metrics compared)",
        "worse:",
        "  gpt::stable_training: no longer runs, was passed: needs 2 GPUs",
        "  gpt::ddp_parity: failed, was passed: gradients are 2 x",
        "  gpt::tp_memory: gone, was passed",
        "new:",
        "  gpt::tp_forward: passed, and was not there before",
    ]


def test_a_session_that_was_cut_off_did_not_lose_its_tests() -> None:
    cut = report(day=29, verdict="incomplete")
    assert compare(report(entry()), cut).worse[0].text == (
        "gpt::stable_training: not reached before the session ended, was passed"
    )


def test_a_metric_that_is_worse() -> None:
    old = report(entry(metrics={"tokens_per_second": speed(12750)}))
    new = report(entry(metrics={"tokens_per_second": speed(11200)}), day=29)
    (worse,) = compare(old, new).worse
    assert worse.text == (
        "tokens_per_second[gpt-stable_training] is 12 % below the report of 2026-11-28, 4d1c2ab: "
        "11,200 against 12,750 tokens/s; noise explains ±4.2 %, and less than 10 % is not told"
    )
    assert [change.metric for change in compare(new, old).of("better")] == ["tokens_per_second"]


@pytest.mark.parametrize(
    ("machine", "said"),
    [
        ({"gpus": []}, "GPUs 1 x H200 against none"),
        ({"torch": "2.14.0"}, "torch 2.13.0 against 2.14.0"),
        ({"cpu": "Xeon", "cores": 8}, "CPU EPYC against Xeon; CPU cores 16 against 8"),
        ({"gpu_origin": "pretended by GPUTRAIN_FAKE_GPUS"}, "pretended GPUs against real ones"),
    ],
)
def test_other_hardware_is_said_first_and_its_figures_are_not_compared(
    machine: dict[str, Any], said: str
) -> None:
    old = report(entry(metrics={"tokens_per_second": speed(100)}), entry(check="ddp_parity"))
    new = report(
        entry(metrics={"tokens_per_second": speed(1)}), entry(check="ddp_parity", outcome="failed"), **machine
    )
    found = compare(old, new)
    first = str(found).splitlines()[0]
    assert first == f"different hardware or torch: {said}: verdicts are compared, figures are not"
    assert [change.test for change in found.worse] == ["gpt::ddp_parity"]
    assert [change.kind for change in found.changes if change.metric] == ["not comparable"]


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"labels": ["simulated"]}, "no label against simulated"),
        ({"figures": {"world_size": 4}}, "world size not given against 4"),
        ({"figures": {"iterations": 1000}}, "iterations not given against 1000"),
    ],
)
def test_other_settings(fields: dict[str, Any], said: str) -> None:
    old = report(entry(metrics={"tokens_per_second": speed(100)}))
    found = compare(old, report(entry(metrics={"tokens_per_second": speed(1)}, **fields)))
    assert found.notes == (f"different settings: {said}: figures of those tests are not compared",)
    assert not found.metrics_compared


def test_a_loss_of_another_step_is_not_compared() -> None:
    metrics = {"final_loss": speed(2.0), "tokens_per_second": speed(100)}
    old = report(entry(metrics=metrics, figures={"steps": 100}))
    found = compare(old, report(entry(metrics=metrics, figures={"steps": 90})))
    assert [change.metric for change in found.of("not comparable")] == ["final_loss"]
    assert found.metrics_compared == 1


def test_three_nights_tell_their_own_spread() -> None:
    nights = [
        report(entry(metrics={"tokens_per_second": speed(value)}), day=day)
        for day, value in ((24, 1000), (25, 1004), (26, 996))
    ]
    new = report(entry(metrics={"tokens_per_second": speed(900)}), day=27)
    (worse,) = compare(nights[-1], new, earlier=nights[:-1]).worse
    assert worse.text == (
        "tokens_per_second[gpt-stable_training] is 10.0 % below the median of the last 3 of 3 good nights "
        "(2026-11-26, 4d1c2ab): 900 against 1,000 tokens/s; noise explains ±7.7 %"
    )


def test_ten_thousand_tests() -> None:
    old = report(*(entry(check=f"c{number}") for number in range(10_000)))
    assert len(compare(old, old).of("same")) == 10_000


def test_nights_in_their_order_and_what_cannot_be_read(tmp_path: Path) -> None:
    for day, verdict in ((27, "passed"), (26, "failed"), (28, "passed")):
        folder = tmp_path / f"night{30 - day}"
        folder.mkdir()
        (folder / "report.json").write_text(json.dumps(report(entry(), day=day, verdict=verdict)))
    cut = tmp_path / "night9"
    cut.mkdir()
    (cut / "report.json").write_text('{"schema": "gputr')
    nights, unread = read_nights([tmp_path, tmp_path / "night2" / "report.json"])
    assert [(night.date[-2:], night.verdict, night.good) for night in nights] == [
        ("26", "failed", False),
        ("27", "passed", True),
        ("28", "passed", True),
    ]
    assert len(unread) == 1 and "is not JSON" in unread[0] and "cut off or edited" in unread[0]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[]", "is no report of gputrain (its schema is not 'gputrain.report')"),
        ('{"schema": "gputrain.report", "version": 7}',
         "is of version 7 of the report, this reads version 1; use the gputrain that wrote it, or write it "
         "again"),
        ('{"schema": "gputrain.report", "version": 1}',
         "is no whole report: it lacks verdict, session, machines, tests"),
    ],
)  # fmt: skip
def test_what_is_no_report(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "report.json"
    path.write_text(text)
    with pytest.raises(ReportError) as error:
        load_report(path)
    assert str(error.value) == f"{path} {said}"


def test_a_path_without_reports(tmp_path: Path) -> None:
    with pytest.raises(ReportError, match=r"holds no report.json, nor do the folders in it"):
        read_nights([tmp_path])
    with pytest.raises(ReportError, match=r"is not there; give a report.json"):
        read_nights([tmp_path / "x"])
