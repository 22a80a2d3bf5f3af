"""One rank as the supervisor sees it, and what it comes to at the end."""

from __future__ import annotations

import socket
import time
from pathlib import Path
from typing import Any

from . import output, payload, stacks, wire
from .records import RankError, RankOutcome, RankResult

_MOVED_SECONDS = 0.03
"""CPU seconds within a second that count as movement: background threads of an idle rank use far less."""


class Member:
    """A rank: its socket, its report, its exit, and when it last moved."""

    def __init__(self, rank: int, sock: socket.socket | None = None) -> None:
        self.rank = rank
        self.sock = sock
        self.reader = wire.Reader(sock) if sock else None
        self.pid: int | None = None
        self.restart = 0
        self.report: dict[str, Any] | None = None
        self.body = b""
        self.rest: list[str] | None = None
        self.exit: dict[str, Any] | None = None
        self.last_moved = time.monotonic()
        self.moving = False
        self.stacks = ""
        self.waiting_at: str | None = None
        self.waits_in: str | None = None
        self.in_collective = self.in_backward = False
        self.at_own_line = False
        self.waits_in_vain = False
        self.records: list[dict[str, Any]] = []
        self._used, self._size = 0.0, 0
        self._since = float("-inf")

    def hello(self, header: dict[str, Any]) -> None:
        """A process says that it plays this rank, perhaps after a restart."""
        self.rank, self.pid, self.restart = header["rank"], header["pid"], header["restart"]
        self.report, self.body, self.exit = None, b"", None
        self.last_moved = header["at"]

    def reported(self, header: dict[str, Any], body: bytes) -> None:
        """The rank's one report."""
        self.report, self.body = header, body

    def at_rest(self, header: dict[str, Any]) -> None:
        """What a warm rank has found after its report that the function left behind."""
        self.rest = header["dirt"]

    def exited(self, header: dict[str, Any]) -> None:
        """The rank's process is gone."""
        self.exit = header

    @property
    def location(self) -> str | None:
        """The user's line at which the rank is, or was when it returned or raised."""
        if self.report is None:
            return self.waiting_at
        return (self.report.get("error") or self.report).get("location")

    @property
    def settled(self) -> bool:
        """Whether nothing more is to come from this rank."""
        return self.report is not None or self.exit is not None

    @property
    def failed(self) -> bool:
        """Whether this rank alone makes the launch red: it failed, or is gone without a report."""
        if self.report is not None:
            return bool(self.report["state"] == "failed")
        return self.exit is not None

    @property
    def echoes(self) -> bool:
        """Whether it failed because another rank went away."""
        error = self.report.get("error") if self.report is not None else None
        return self.failed and error is not None and RankError(**error).is_victim

    @property
    def failed_at(self) -> float | None:
        """When this rank failed of its own accord; None if it did not, or was ended by torchrun."""
        if self.report is not None:
            error = RankError(**self.report["error"]) if self.report.get("error") else None
            own = self.report["state"] == "failed" and not (error and error.is_victim)
            return float(self.report["at"]) if own else None
        if self.exit is not None and self.exit["signal"] != "SIGTERM":
            return float(self.exit["at"])
        return None

    def observe(self, now: float, used: float, size: int) -> None:
        """Takes a sample of CPU seconds used and bytes printed so far."""
        worked = abs(used - self._used) >= _MOVED_SECONDS and not self.waits_in_vain
        if worked or size != self._size:
            self.last_moved = self._since = now
            self._used, self._size = used, size
        elif now - self._since > 1.0:
            self._since, self._used = now, used

    def settle_down(self) -> None:
        """Forgets fractions of a tick collected so far, before a last look."""
        self._since = float("-inf")

    def result(self, folder: Path, start: float, *, ended_after: float) -> RankResult:
        """What became of the rank, with its output read from ``folder``."""
        path = folder / f"rank{self.rank}"
        state, at = self._state(ended_after)
        found = RankResult(
            self.rank, state, pid=self.pid, seconds=max(0.0, at - start) if at else 0.0,
            stdout=self._stream(path / "stdout.log"), stderr=self._stream(path / "stderr.log"),
            stacks=self.stacks, waiting_at=self.waiting_at, in_collective=self.in_collective,
            moving=self.moving,
        )  # fmt: skip
        if self.exit is not None:
            found.exit_code, found.signal = self.exit["exit_code"], self.exit["signal"]
        if self.report is not None:
            found.exit_code = self.report.get("exit_code", found.exit_code)
            found.peak_bytes = self.report.get("peak_bytes")
            if (error := self.report.get("error")) is not None:
                found.error = RankError(**error)
            if state == "passed":
                self._unpack(found)
            else:
                found.attached = self.body
        elif state == "crashed":
            dump = _read(path / "crash.txt").partition("\nExtension modules:")[0]
            found.stacks = stacks.last_dump(dump)
            frame = stacks.user_frame(stacks.main_thread(dump))
            found.waiting_at = str(frame) if frame else None
        return found

    def _state(self, ended_after: float) -> tuple[RankOutcome, float | None]:
        if self.report is not None:
            return self.report["state"], self.report["at"]
        if self.exit is None:
            return "ended", None
        # torchrun ends the other workers after a failure: these did not crash, they were ended.
        if self.exit["signal"] in ("SIGTERM", "SIGKILL") and self.exit["at"] > ended_after:
            return "ended", self.exit["at"]
        return "crashed", self.exit["at"]

    def _unpack(self, found: RankResult) -> None:
        try:
            found.value = payload.unpack_value(self.body)
        except Exception as error:  # unpickling runs foreign code
            found.state = "failed"
            why = f"{type(error).__name__}: {error}"
            text = f"the value that rank {self.rank} returned cannot be read here: {why}"
            found.error = RankError("UnpicklableValue", text, "", None)

    @staticmethod
    def _stream(path: Path) -> str:
        if text := output.read(path):
            output.compact(path, text)
        return text


def _read(path: Path) -> str:
    try:
        return path.read_text(errors="replace")
    except OSError:
        return ""
