"""pytest's own fixtures on a rank: what stands for them on the way there, and what they become."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from pytest_gputrain.plugin.known_there import VALUES

_HERE_ONLY = {
    "request": "take what the test needs of it in a fixture, and return that",
    "pytestconfig": "take what the test needs of it in a fixture, and return that",
    "cache": "use it in a fixture",
    "record_property": "take ddp_launcher, return the figures from the ranks and record result.values",
    "record_xml_attribute": "use it in a fixture",
    "record_testsuite_property": "use it in a fixture",
    "subtests": "parametrize the test",
    "pytester": "use it in a test without ranks",
    "ddp_launcher": "this test is on ranks already; call the function",
}


def here_only(name: str) -> str | None:
    """Why a fixture cannot go to the ranks and the way out, or None."""
    return (
        f"belongs to the pytest process and is of no use on ranks; {_HERE_ONLY[name]}"
        if name in _HERE_ONLY
        else None
    )


class Standing(NamedTuple):
    """Stands for one of pytest's fixtures until it arrives; ``more`` is what its maker there needs."""

    kind: str
    more: Any = None


def standing_for(name: str, value: object) -> object:
    """Return what travels for the value of a fixture: the value itself, unless it is one of pytest's own."""
    if isinstance(value, pytest.CaptureFixture):
        return Standing("capture", (name.startswith("capfd"), name.endswith("binary")))
    if isinstance(value, pytest.LogCaptureFixture):
        return Standing("log", type(value.handler))
    if isinstance(value, pytest.TempPathFactory):
        return Standing("folders", str(value.getbasetemp()))
    if isinstance(value, pytest.WarningsRecorder):
        return Standing("warnings")
    if isinstance(value, pytest.MonkeyPatch):
        return Standing("patches")
    return value


@contextlib.contextmanager
def arrived(value: object) -> Iterator[object]:
    """What the test gets on a rank for what was sent; what it changes there is put back."""
    if not isinstance(value, Standing):
        yield value
    elif value.kind == "capture":
        by_descriptor, binary = value.more
        with (_captured_files if by_descriptor else _captured_streams)(binary) as capture:
            yield capture
    elif value.kind == "log":
        with _captured_log(value.more) as log:
            yield log
    elif value.kind == "folders":
        yield RankFolders(Path(value.more), VALUES["rank"])
    elif value.kind == "warnings":
        with pytest.WarningsRecorder(_ispytest=True) as recorder:
            warnings.simplefilter("default")
            yield recorder
    else:
        with pytest.MonkeyPatch.context() as patch:
            yield patch


class Captured(NamedTuple):
    """What ``readouterr`` returns."""

    out: Any
    err: Any


class RankCapture:
    """``capsys`` and its kin on a rank. What it reads is also in the rank's own output."""

    def __init__(self, out: _Tee | _Tail, err: _Tee | _Tail, binary: bool) -> None:
        self._sources, self._binary = (out, err), binary

    def readouterr(self) -> Captured:
        """What was written since the last time."""
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        texts = [source.take() for source in self._sources]
        return Captured(*(texts if self._binary else [text.decode(errors="replace") for text in texts]))

    @contextlib.contextmanager
    def disabled(self) -> Iterator[None]:
        """Nothing to do: a rank has no terminal, its output goes to its section of the report."""
        yield


class _Tee(io.BytesIO):
    """Keeps what is written and hands it on."""

    def __init__(self, onward: io.TextIOWrapper) -> None:
        super().__init__()
        self._onward = onward

    def write(self, data: Any) -> int:
        self._onward.buffer.write(data)
        self._onward.buffer.flush()
        return super().write(data)

    def take(self) -> bytes:
        data = self.getvalue()
        self.seek(0)
        self.truncate()
        return data


class _Tail:
    """Reads on in the file behind a descriptor, from where it ended at the start."""

    def __init__(self, number: int) -> None:
        self._file = open(f"/proc/self/fd/{number}", "rb")  # noqa: SIM115 - closed by _captured_files
        self._file.seek(0, os.SEEK_END)
        self.close = self._file.close

    def take(self) -> bytes:
        return self._file.read()


@contextlib.contextmanager
def _captured_streams(binary: bool) -> Iterator[RankCapture]:
    before = sys.stdout, sys.stderr
    tees = [_Tee(stream) for stream in before]  # type: ignore[arg-type]
    sys.stdout, sys.stderr = (
        io.TextIOWrapper(tee, encoding="utf-8", newline="", write_through=True) for tee in tees
    )
    try:
        yield RankCapture(tees[0], tees[1], binary)
    finally:
        sys.stdout, sys.stderr = before


@contextlib.contextmanager
def _captured_files(binary: bool) -> Iterator[RankCapture]:
    sys.stdout.flush()
    sys.stderr.flush()
    with contextlib.closing(_Tail(1)) as out, contextlib.closing(_Tail(2)) as err:
        yield RankCapture(out, err, binary)


# Marked final for type checkers only.
class RankLog(pytest.LogCaptureFixture):  # type: ignore[misc]
    """``caplog`` on a rank: pytest's own, around a handler of the rank."""

    def __init__(self, handler: Any) -> None:
        super().__init__(None, _ispytest=True)  # type: ignore[arg-type]
        self._rank_handler = handler

    @property
    def handler(self) -> Any:
        return self._rank_handler

    def get_records(self, when: str) -> list[logging.LogRecord]:
        return list(self.handler.records) if when == "call" else []


@contextlib.contextmanager
def _captured_log(handler_type: Any) -> Iterator[RankLog]:
    log, root = RankLog(handler_type()), logging.getLogger()
    root.addHandler(log.handler)
    try:
        yield log
    finally:
        root.removeHandler(log.handler)
        if undo := getattr(
            log, "_finalize", None
        ):  # levels that the test set; else only a kept rank keeps them
            undo()


class RankFolders:
    """``tmp_path_factory`` on a rank: folders beside the session's others, named by the rank."""

    def __init__(self, base: Path, rank: int) -> None:
        self._base, self._rank = base, rank

    def getbasetemp(self) -> Path:
        """The session's folder."""
        return self._base

    def mktemp(self, basename: str, numbered: bool = True) -> Path:
        """Make a folder of this rank and return it."""
        own = f"{basename}-rank{self._rank}"
        if not numbered:
            (self._base / own).mkdir(mode=0o700)
            return self._base / own
        number = 0
        while True:
            path = self._base / f"{own}-{number}"
            with contextlib.suppress(FileExistsError):
                path.mkdir(mode=0o700)
                return path
            number += 1
