"""ci/night in a user's project, without GPUs: what is red, what is kept, what the summary says."""

from __future__ import annotations

import json
import signal
import time

import pytest

from tests.ci.conftest import Machine, end

pytestmark = pytest.mark.skipif("sys.platform != 'linux'", reason="launching ranks needs Linux")
CPU = {"GPUTRAIN_CASE": "my_package.cases:gpt", "NIGHT_DEVICE": "cpu", "NIGHT_CHECKS": "batch_size_found"}


@pytest.mark.parametrize(
    ("environ", "line"),
    [
        ({}, "GPUTRAIN_CASE is not set; give your cases: GPUTRAIN_CASE=package.module:case"),
        ({"NIGHT_DEVICE": "tpu"}, "NIGHT_DEVICE=tpu: must be cuda or cpu"),
        ({"NIGHT_GPUS": "0"}, "NIGHT_GPUS=0: must be a number of GPUs, from 1"),
    ],
)
def test_bad_input_is_one_line(machine: Machine, environ: dict[str, str], line: str) -> None:
    assert machine.bash("ci/night", **environ) == (2, f"ci/night: {line}\n")
    assert not (machine.project / "report").exists()


def test_a_report_of_nothing_is_not_green(machine: Machine) -> None:
    said = "ci/night: nothing ran, so there is no report in report: exit code 5\n"
    assert machine.bash("ci/night", "report") == (5, said)


@pytest.mark.slow
def test_the_first_nights(machine: Machine) -> None:
    nights, report = machine.project / "nights", machine.project / "report"

    # Nothing to compare with, and a failing test: both are told, and it is no night to hold another against.
    code, said = machine.bash("ci/night", TESTS="fail", **CPU)
    assert code == 1, said
    assert "gputrain check: nights is not there" in said
    assert "if nights has no good night for them yet: NIGHT_NEW_BASELINE=1\n" in said
    told = (report / "summary.md").read_text().splitlines()
    assert told[0].startswith("**Exit code 1**: `pytest -m not gpu ")
    assert told[2].startswith("**Exit code 2**: `gputrain check --device cpu --world-size 2 ")
    assert not nights.exists()

    code, said = machine.bash("ci/night", NIGHT_NEW_BASELINE="1", **CPU)
    assert code == 0, said
    assert (report / "summary.md").read_text().startswith("## gputrain: ✅ passed\n")
    assert (report / "junit.xml").exists() and (report / "index.html").exists()
    (first,) = nights.iterdir()
    assert json.loads((first / "report.json").read_text())["verdict"] == "passed"

    # A red night is kept as well, and what is older than thirty goes.
    for number in range(30):
        (nights / f"night-20200101T0000{number:02}Z").mkdir()
    code, said = machine.bash("ci/night", TESTS="fail", **CPU)
    assert code == 1, said
    assert "== baseline: passed\nno regression from the last good night" in said
    kept = sorted(nights.iterdir())
    assert len(kept) == 30 and kept[-2] == first and kept[0].name == "night-20200101T000002Z"
    assert json.loads((kept[-1] / "report.json").read_text())["verdict"] == "failed"


@pytest.mark.slow
def test_a_night_that_ci_ends_says_so_and_keeps_what_there_is(machine: Machine) -> None:
    process = machine.start(["bash", "ci/night"], TESTS="wait", **CPU)
    try:
        limit = time.monotonic() + 60
        while not (machine.project / "waiting").exists():
            assert process.poll() is None and time.monotonic() < limit
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)  # to the shell alone, as CI does
        said = process.communicate(timeout=60)[0]
    finally:
        end(process)
    assert process.returncode == 143, said
    assert "gputrain check" not in said
    summary = (machine.project / "report" / "summary.md").read_text()
    assert "**The night was cut off before its end.**" in summary
    assert "interrupted" in summary
    assert not (machine.project / "nights").exists()


@pytest.mark.slow
def test_without_gpus_a_night_is_red(machine: Machine) -> None:
    code, said = machine.bash("ci/night", GPUTRAIN_CASE="my_package.cases:gpt", NIGHT_NEW_BASELINE="1",
                              GPUTRAIN_FAKE_GPUS="0")  # fmt: skip
    assert code == 1, said
    assert "--require-gpus 2: needs 2 GPUs, found 0" in said
    assert "gputrain check: --device cuda --world-size 2 needs 2 GPUs, found 0" in said
    assert "no test was run" in (machine.project / "report" / "summary.md").read_text()
