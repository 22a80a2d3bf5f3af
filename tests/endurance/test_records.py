"""A rank's records: both ways, whatever a crash leaves of them."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest

from pytest_gputrain.endurance.records import (
    RecordsError,
    RecordWriter,
    StepRecord,
    path_of,
    read_records,
    record_of,
    write_records,
)

RECORD = StepRecord(
    step=1, loss=0.1 + 0.2, seconds=0.25, finite={"loss": True, "gradients": False}, rss_bytes=7, digest="ab"
)


def five(path: Path) -> None:
    write_records(path, [replace(RECORD, step=step) for step in range(1, 6)])


@pytest.mark.parametrize("loss", [0.1 + 0.2, 5e-324, math.inf, -math.inf, None])
def test_a_record_comes_back_bit_by_bit(loss: float | None) -> None:
    record = replace(RECORD, loss=loss)
    assert record_of(record.line()) == record


def test_what_was_not_measured_takes_no_room() -> None:
    assert "null" not in RECORD.line()
    assert record_of(replace(RECORD, heap_bytes=None).line()).heap_bytes is None


def test_nan_is_legal_json_and_comes_back() -> None:
    line = replace(RECORD, loss=math.nan).line()
    assert '"loss": "nan"' in line
    assert math.isnan(record_of(line).loss or 0.0)


def test_what_is_written_is_there_before_the_file_is_closed(tmp_path: Path) -> None:
    writer = RecordWriter(path_of(tmp_path, 3))
    writer.write(RECORD)
    assert read_records(tmp_path / "steps-rank3.jsonl").records == (RECORD,)
    writer.close()


def test_a_later_version_may_write_more_fields() -> None:
    assert record_of(RECORD.line().replace("{", '{"new": 1, ', 1)) == RECORD


def test_a_last_line_cut_off_by_a_crash_is_left_out_with_a_note(tmp_path: Path) -> None:
    path = path_of(tmp_path, 0)
    five(path)
    path.write_bytes(path.read_bytes()[:-40])
    found = read_records(path)
    assert [record.step for record in found.records] == [1, 2, 3, 4]
    assert found.cut == "steps-rank0.jsonl: line 5 was cut off by a crash and is left out"


def test_a_damaged_line_in_the_middle_is_refused(tmp_path: Path) -> None:
    path = path_of(tmp_path, 0)
    five(path)
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join([*lines[:2], lines[2][:30] + "\n", *lines[3:]]))
    with pytest.raises(RecordsError) as refused:
        read_records(path)
    assert str(refused.value) == (
        f"{path}: line 3 of 5 is not a step's record; the file was changed or damaged: restore it, or remove "
        "the folder to start anew"
    )


def test_a_missing_line_is_refused(tmp_path: Path) -> None:
    path = path_of(tmp_path, 0)
    write_records(path, [RECORD, replace(RECORD, step=3)])
    with pytest.raises(RecordsError, match=r"line 2 has step 3 after step 1; "):
        read_records(path)


def test_no_file_holds_no_records(tmp_path: Path) -> None:
    assert read_records(path_of(tmp_path, 0)).records == ()
