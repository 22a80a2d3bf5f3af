"""``sweep_results.json``: what became of each branch, written anew after every one of them.

Runners that share a folder (an array of Slurm tasks runs one branch each) add to one file: each reads it,
replaces its own branch's entry and writes it, under a lock.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pytest_gputrain.sweep.config_file import SweepError
from pytest_gputrain.sweep.metrics import Point
from pytest_gputrain.whole_files import replacing

if TYPE_CHECKING:
    from filelock import BaseFileLock

RESULTS, LOCK = "sweep_results.json", ".sweep_results.lock"
FORMAT, VERSION = "pytest-gputrain sweep", 1
LOCK_DEADLINE = 60.0
MOST_POINTS = 1000
"""Of a branch's curve in the file; a longer one is thinned, its last point kept."""


@dataclass(frozen=True, kw_only=True)
class BranchResult:
    """What became of a branch. None: not known, or not a number.

    verdict: PASSED, FAILED, CRASHED, HUNG, TIMED_OUT, SKIPPED or CANCELLED; success: PASSED alone. duration
    in seconds. exit_code: of the rank that went wrong first, negative for a signal. tokens: seen.
    learning_rate: the highest that was stepped with. curve: (tokens seen, loss). message: why, one line.
    notes: what is unusual or was not checked. resumed: an earlier run of the sweep had done it.
    """

    k: int
    name: str
    success: bool
    verdict: str
    duration: float
    exit_code: int | None
    log_file: str
    final_loss: float | None = None
    eval_loss: float | None = None
    tokens: int | None = None
    learning_rate: float | None = None
    planned_learning_rate: float | None = None
    message: str = ""
    notes: tuple[str, ...] = ()
    resumed: bool = False
    config_sha256: str = ""
    checkpoint_sha256: str = ""
    command: str = ""
    script_sha256: str = ""
    curve: tuple[tuple[int, float], ...] = field(default=(), repr=False)

    def is_of(self, config: str, checkpoint: str, command: str) -> bool:
        """Whether it comes from this configuration, checkpoint and command."""
        mine = (self.config_sha256, self.checkpoint_sha256, self.command)
        return mine == (config, checkpoint, command)


def curve_of(points: Sequence[Point], values: Mapping[str, Any]) -> tuple[tuple[int, float], ...]:
    """(tokens, loss) of the steps; where the script reports no tokens, those that are planned at its step."""
    size, block = values["total_batch_size"], values["block_size"]
    base = min((point.step for point in points), default=1)
    found = [
        (
            point.tokens
            if point.tokens is not None
            else min((point.step - base + 1) * size * block, values["tokens"]),
            point.loss,
        )
        for point in points
        if math.isfinite(point.loss)
    ]
    stride = -(-len(found) // MOST_POINTS) if found else 1
    return tuple(found[(len(found) - 1) % stride :: stride])


class ResultsFile:
    """The file of a results folder. ``head``: what is said of the whole sweep, such as the checkpoint."""

    def __init__(self, folder: Path, head: Mapping[str, Any]) -> None:
        self.path, self._folder, self._head = folder / RESULTS, folder, dict(head)

    def read(self) -> list[BranchResult]:
        """What is there; nothing where it cannot be read, as after another program has written it."""
        try:
            document = json.loads(self.path.read_text(encoding="utf-8"))
            return [_result(entry) for entry in document["results"]]
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            return []

    def write(self, mine: Iterable[BranchResult], order: Sequence[int], **head: Any) -> list[BranchResult]:
        """Put these entries in, keep those of the others that are in ``order``; return all, in that order.

        Raises OSError.
        """
        with self._locked():
            entries = {entry.k: entry for entry in (*self.read(), *mine)}
            kept = [entries[k] for k in order if k in entries and self._is_ours(entries[k])]
            document = {
                "format": FORMAT,
                "version": VERSION,
                **self._head,
                **head,
                "successful_runs": sum(entry.success for entry in kept),
                "total_runs": len(kept),
                "planned_runs": len(order),
                "results": [_record(entry) for entry in kept],
            }
            text = json.dumps(document, indent=2, allow_nan=False) + "\n"
            with replacing(self.path) as unfinished:
                unfinished.write_text(text, encoding="utf-8")
        return kept

    def _is_ours(self, entry: BranchResult) -> bool:
        """Results of another checkpoint or command are not to be compared with these."""
        mine = (self._head["checkpoint_sha256"], self._head["command"])
        return mine == (entry.checkpoint_sha256, entry.command)

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        from filelock import FileLock, Timeout

        try:
            with FileLock(self._folder / LOCK, timeout=LOCK_DEADLINE):
                yield
        except Timeout:  # whoever holds it is stopped: better two writers than none
            yield


def check_results_folder(folder: Path) -> None:
    """Make the folder, and a file in it. Raises SweepError where that cannot be."""
    probe = folder / f".probe.{os.getpid()}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.write_bytes(b"")
        probe.unlink()
        if (folder / RESULTS).is_dir():
            raise IsADirectoryError(None, f"{RESULTS} in it is a folder")
    except OSError as error:
        raise SweepError(
            f"{folder} cannot be written ({error.strerror or error}); give a folder that can be, by --out"
        ) from None


def hold(folder: Path, name: str) -> BaseFileLock:
    """Hold a branch as long as it runs. Raises SweepError where another runner does."""
    from filelock import FileLock, Timeout

    lock = FileLock(folder / f".{name}.lock", timeout=0, thread_local=False)
    try:
        lock.acquire()
    except Timeout:
        raise SweepError(
            f"{name} is being run by another process, with results in {folder}; "
            "wait for it, or give another --out"
        ) from None
    return lock


def _record(entry: BranchResult) -> dict[str, Any]:
    """As JSON knows it: neither NaN nor infinity."""
    return {
        name: None if isinstance(value, float) and not math.isfinite(value) else value
        for name, value in asdict(entry).items()
    }


def _result(record: Mapping[str, Any]) -> BranchResult:
    curve = tuple((int(tokens), float(loss)) for tokens, loss in record["curve"])
    return BranchResult(**{**record, "notes": tuple(record["notes"]), "curve": curve})
