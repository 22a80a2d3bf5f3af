"""``heartbeat_rank{r}.jsonl``: a line a step, at most one a second once training runs, in a bounded file.

Never waits for a GPU: loss and norm are copied behind its work, and the line of a step is written when the
copies are there, at the latest with the next but one heartbeat.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import sys
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from pytest_gputrain.trace.lines import heartbeat_file

EVERY = 1.0
"""Seconds between lines. The first steps are all written: a run that ends early has something to show."""
FIRST_STEPS = 10
LINES_AT_A_RATE = 2000
"""After so many lines the time between them doubles, so that a run of a month has some 30,000."""


@dataclass
class Scalar:
    """A number that may still be on its way from the GPU."""

    tensor: Any = None
    event: Any = None

    @classmethod
    def of(cls, tensor: Any) -> Scalar:
        """Starts the copy of a tensor of one element; anything else is no number."""
        with contextlib.suppress(Exception):  # fake, sharded and functional tensors: not known, then
            if tensor is None or tensor.numel() != 1 or hasattr(tensor, "full_tensor"):
                return cls()
            if tensor.device.type != "cuda":
                return cls(tensor.detach().clone())
            import torch

            copied = torch.empty((), dtype=tensor.dtype, pin_memory=True)
            copied.copy_(tensor.detach().reshape(()), non_blocking=True)
            event = torch.cuda.Event()
            event.record()
            return cls(copied, event)
        return cls()

    @property
    def ready(self) -> bool:
        """Whether reading it waits for nothing."""
        return self.event is None or bool(self.event.query())

    @property
    def value(self) -> float | None:
        """The number; None where there is none, or where JSON has no word for it (NaN, infinite)."""
        with contextlib.suppress(Exception):
            number = float(self.tensor)
            return number if number - number == 0 else None
        return None


@dataclass
class Beat:
    """What one step has to say."""

    step: int
    msg: str
    loss: Scalar = field(default_factory=Scalar)
    grad_norm: Scalar = field(default_factory=Scalar)
    toks_per_s: float | None = None
    ts: float = field(default_factory=time.time)


class Heartbeat:
    """Writes a rank's heartbeats."""

    def __init__(self, folder: Path, rank: int) -> None:
        self._rank = rank
        self._path = folder / heartbeat_file(rank)
        self._pid = os.getpid()
        self._file: IO[str] | None = None
        self._every = EVERY
        self._lines = 0
        self._last = float("-inf")
        self._pending: Beat | None = None
        self._lock = threading.RLock()  # the watchdog's thread has a word too

    def due(self, step: int) -> bool:
        """Whether this step gets a line."""
        return time.monotonic() - self._last >= self._every or (step <= FIRST_STEPS and self._pending is None)

    def beat(self, beat: Beat) -> None:
        """Writes the line, or keeps it until its numbers are there."""
        if os.getpid() != self._pid:
            return
        with self._lock:
            self._last = time.monotonic()
            self.flush()
            if beat.loss.ready and beat.grad_norm.ready:
                self._write(beat)
            else:
                self._pending = beat

    def poll(self) -> None:
        """Writes the line that was waiting for the GPU, if its numbers have come."""
        pending = self._pending
        if pending is not None and pending.loss.ready and pending.grad_norm.ready:
            self.flush()

    def flush(self) -> None:
        """Writes the line that waits, with what is known."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.loss = pending.loss if pending.loss.ready else Scalar()
            pending.grad_norm = pending.grad_norm if pending.grad_norm.ready else Scalar()
            self._write(pending)

    def close(self) -> None:
        """Writes what waits and closes the file."""
        if os.getpid() == self._pid:
            self.flush()
            if self._file is not None:
                self._file.close()
        self._file = None

    def _write(self, beat: Beat) -> None:
        self._lines += 1
        if self._lines % LINES_AT_A_RATE == 0:
            self._every *= 2
        allocated, reserved = _gpu_memory()
        line = {
            "ts": round(beat.ts, 3),
            "iso": _iso(beat.ts),
            "pid": self._pid,
            "rank": self._rank,
            "step": beat.step,
            "msg": beat.msg,
            "gpu_mem_alloc": allocated,
            "gpu_mem_reserved": reserved,
            "loss": beat.loss.value,
            "toks_per_s": beat.toks_per_s,
            "grad_norm": beat.grad_norm.value,
        }  # fmt: skip
        if self._file is None:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._file = open(self._path, "a", encoding="utf-8")  # noqa: SIM115 - closed in close()
        self._file.write(json.dumps(line, allow_nan=False) + "\n")
        self._file.flush()


def _iso(ts: float) -> str:
    return datetime.datetime.fromtimestamp(ts, datetime.timezone.utc).isoformat("T", "milliseconds")


def _gpu_memory() -> tuple[int | None, int | None]:
    """(allocated, reserved) bytes; None where no CUDA context is, since asking must not make one."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return None, None
    return torch.cuda.memory_allocated(), torch.cuda.memory_reserved()
