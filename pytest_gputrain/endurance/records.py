"""What one rank writes of each step, one JSON object a line, so that a kill loses at most the last line.

JSON knows no NaN: a number that is not finite is written as the text "nan", "inf" or "-inf" and read back as
the number. Imports no torch.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, TextIO

from pytest_gputrain.endurance.plan import StabilityUsageError

_ENCODE = json.JSONEncoder(allow_nan=False).encode
_NOT_FINITE = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}


class RecordsError(StabilityUsageError):
    """A file of records that cannot be used; one line."""


@dataclass(frozen=True, kw_only=True)
class StepRecord:
    """One step on one rank.

    step: from 1 up. loss: what the step returned, None where that is no number. seconds: of the step alone.
    tokens, samples: in this rank's batch; tokens equals samples where a sample has no length. elements: of
    all tensors of the batch. shapes: that batches have had so far, up to this step. updated: parameters that
    had a gradient when an optimizer stepped, None where none did or it does not say. rate: the highest
    learning rate of its groups. grad_norm: of all gradients when the optimizer stepped, None where not
    measured. finite: "loss", "gradients" and "parameters", as far as they were looked at. allocated_bytes,
    reserved_bytes: torch's allocator, on a GPU only; allocated is what is held after the step. tensor_bytes,
    tensor_count: storages of live tensors, in the steps in which they were counted. heap_bytes: what malloc
    has given out. rss_bytes: host memory of the process. hooks: on modules and parameters; groups: of the
    optimizers' parameters. fds, threads: of the process; objects: blocks that Python's allocator of small
    objects has given out. num_children: processes that descend from the rank, in the steps in which they were
    looked at; children: of each of them pid, name, bytes of its own and fds; children_queued: seconds since
    the look before for which they were ready to run while others ran. digest: of what has to be the same on
    all ranks after the step. whole_digest: of all elements of all parameters, in the steps in which they are
    looked at. batch_digest: of the batch. cpu_seconds, queued_seconds: for which the rank's thread ran, and
    was ready to run while others ran. Without the latter: load_seconds, for the batch; ready_seconds, from
    the begin of the step until its last gradient was there, before ranks wait for each other; update_seconds,
    from the optimizer's step to the end. wait_seconds: for other ranks after the step before. wall: Unix time
    at the end.
    """

    step: int
    loss: float | None
    seconds: float
    tokens: int = 0
    samples: int = 0
    elements: int = 0
    shapes: int = 0
    updated: int | None = None
    rate: float | None = None
    grad_norm: float | None = None
    finite: Mapping[str, bool] = field(default_factory=dict)
    allocated_bytes: int | None = None
    reserved_bytes: int | None = None
    tensor_bytes: int | None = None
    tensor_count: int | None = None
    graph_nodes: int | None = None
    heap_bytes: int | None = None
    rss_bytes: int = 0
    fds: int = 0
    threads: int = 0
    objects: int | None = None
    hooks: int | None = None
    groups: int | None = None
    num_children: int | None = None
    children: Sequence[Mapping[str, Any]] | None = None
    children_queued: float | None = None
    digest: str | None = None
    whole_digest: str | None = None
    batch_digest: str | None = None
    cpu_seconds: float = 0.0
    queued_seconds: float = 0.0
    load_seconds: float = 0.0
    ready_seconds: float | None = None
    update_seconds: float | None = None
    wait_seconds: float = 0.0
    wall: float = 0.0

    def line(self) -> str:
        """The record as JSON, with the newline; fields that are None are left out."""
        content = {name: value for name, value in vars(self).items() if value is not None}
        content.setdefault("loss", None)
        try:
            return f"{_ENCODE(content)}\n"
        except ValueError:
            return f"{_ENCODE({name: _written(value) for name, value in content.items()})}\n"


_NAMES = {spec.name for spec in fields(StepRecord)}


def record_of(line: str) -> StepRecord:
    """The record of a line. Raises ValueError where the line is none; fields that are not known are left."""
    content = json.loads(line)
    if not isinstance(content, dict) or not isinstance(content.get("step"), int):
        raise ValueError("not a record of a step")
    known = {name: _read(value) for name, value in content.items() if name in _NAMES}
    try:
        return StepRecord(**known)
    except TypeError:
        raise ValueError("fields are missing") from None


def _written(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return repr(value)
    return value


def _read(value: Any) -> Any:
    return _NOT_FINITE.get(value, value) if isinstance(value, str) else value


def path_of(folder: Path, rank: int) -> Path:
    """Where a rank's records are."""
    return folder / f"steps-rank{rank}.jsonl"


@dataclass(frozen=True)
class Records:
    """What a file holds. cut: a note about a last line that was not whole, "" where all were."""

    records: tuple[StepRecord, ...]
    cut: str = ""


def read_records(path: Path) -> Records:
    """Read a rank's file; one that is not there holds nothing.

    A last line that is not whole is what a crash leaves and is left out, with a note. Raises RecordsError
    for such a line in the middle, or steps that do not follow one another.
    """
    found, cut, lines = [], "", _lines(path)
    for number, line in enumerate(lines, 1):
        try:
            found.append(record_of(line))
        except ValueError:
            if number < len(lines):
                raise RecordsError(
                    f"{path}: line {number} of {len(lines)} is not a step's record; the file was changed or "
                    "damaged: restore it, or remove the folder to start anew"
                ) from None
            cut = f"{path.name}: line {number} was cut off by a crash and is left out"
            continue
        if len(found) > 1 and found[-1].step != found[-2].step + 1:
            raise RecordsError(
                f"{path}: line {number} has step {found[-1].step} after step {found[-2].step}; the file was "
                "changed or damaged: restore it, or remove the folder to start anew"
            )
    return Records(tuple(found), cut)


def _lines(path: Path) -> list[str]:
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return []
    except OSError as error:
        raise RecordsError(f"{path}: cannot be read ({error.strerror or error})") from None
    return text.splitlines()


def write_records(path: Path, records: Iterable[StepRecord]) -> None:
    """Replace the file by these records: the old one or the new one is there, whenever this process dies."""
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        unfinished.write_text("".join(record.line() for record in records), encoding="utf-8")
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)


class RecordWriter:
    """Appends records; every line is handed to the kernel at once, so that SIGKILL loses at most one."""

    def __init__(self, path: Path) -> None:
        self._file: TextIO | None = path.open("a", encoding="utf-8")

    def write(self, record: StepRecord) -> None:
        assert self._file is not None
        self._file.write(record.line())
        self._file.flush()

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None
