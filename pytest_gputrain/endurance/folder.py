"""The folder of a run: its settings, where each rank's records and checkpoints are, and whether it may go on.

``run.json`` holds what was asked for, where it ran and how it ended. Imports no torch.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pytest_gputrain.endurance.plan import StabilityUsageError
from pytest_gputrain.endurance.records import read_records

SCHEMA, VERSION = "gputrain.stability_run", 1
RUN, LOSSES, PREVIOUS, LOCK = "run.json", "losses.txt", "previous", ".lock"
# What changes the arithmetic, or how ranks talk: without it a run cannot be repeated.
_VARIABLES = re.compile(r"^(CUBLAS_|CUDA_|CUDNN_|NCCL_|GLOO_|OMP_|MKL_|TORCH|PYTORCH_|PYTHONHASHSEED)")
_CHECKPOINT = re.compile(r"checkpoint-(\d+)-rank(\d+)\.pt")


@dataclass(frozen=True)
class Earlier:
    """What an earlier run left. step: of its last checkpoint, 0 where none is whole; ended_at: its last
    recorded step; finished: it came to an end, of whatever kind.
    """

    step: int = 0
    ended_at: int = 0
    finished: bool = False
    notes: tuple[str, ...] = field(default=())


def name_of(case: str, device: str, world_size: int) -> str:
    """The run's folder below the one that was given: ``gpt-d20-cuda-x2``."""
    return f"{re.sub(r'[^A-Za-z0-9_.]+', '-', case).strip('-.') or 'case'}-{device}-x{world_size}"


@contextlib.contextmanager
def held(folder: Path) -> Iterator[None]:
    """Alone in the folder. Raises StabilityUsageError where another run writes there, or none can."""
    from filelock import FileLock, Timeout

    lock = FileLock(str(folder / LOCK), timeout=0)
    with written_to(folder):
        folder.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire()
        except Timeout:  # an OSError as well
            raise StabilityUsageError(
                f"{folder}: another run writes there; wait for it, or give this one another folder"
            ) from None
    try:
        remove_unfinished(folder)
        yield
    finally:
        lock.release()
        with contextlib.suppress(OSError):  # nothing is left where nothing could be written
            if [*folder.iterdir()] == [folder / LOCK]:
                (folder / LOCK).unlink()
                folder.rmdir()
                folder.parent.rmdir()


@contextlib.contextmanager
def written_to(folder: Path) -> Iterator[None]:
    """Before anything runs: what cannot be written there becomes a StabilityUsageError, in one line."""
    try:
        yield
    except OSError as error:
        raise StabilityUsageError(
            f"{folder} cannot be written to ({error.strerror or error}); free space there, or give another "
            "folder"
        ) from None


def remove_unfinished(folder: Path) -> None:
    """What a process that was killed had not renamed yet."""
    for path in folder.glob(".*.[0-9]*"):
        path.unlink(missing_ok=True)


def look(folder: Path, settings: Mapping[str, Any]) -> Earlier | None:
    """What is there already; None for nothing. Raises StabilityUsageError for a run of other settings."""
    path = folder / RUN
    if not path.exists():
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        version = content["version"] if content["schema"] == SCHEMA else None
    except (OSError, ValueError, KeyError, TypeError):
        version = None
    if version != VERSION:
        what = "no stability run's" if version is None else f"of version {version!r}, not {VERSION}"
        raise StabilityUsageError(f"{path} is {what}; remove {folder} to start anew, or give another folder")
    ended_at, notes = _recorded(folder, settings["world_size"])
    finished = bool(content.get("ended"))
    if not finished:
        _refuse_other(folder, content.get("settings", {}), settings)
    return Earlier(last_checkpoint(folder, settings["world_size"]), ended_at, finished, notes)


def _refuse_other(folder: Path, there: Mapping[str, Any], asked: Mapping[str, Any]) -> None:
    other = [name for name in asked if there.get(name) != asked[name]]
    if other:
        told = ", ".join(f"{name} {there.get(name)!r}, not {asked[name]!r}" for name in other)
        raise StabilityUsageError(
            f"{folder} holds an unfinished run of other settings ({told}); run it with those to go on, or "
            "remove the folder to start anew"
        )


def _recorded(folder: Path, world_size: int) -> tuple[int, tuple[str, ...]]:
    """The last step that a rank recorded, and notes on lines cut off."""
    found = [read_records(folder / f"steps-rank{rank}.jsonl") for rank in range(world_size)]
    last = max((one.records[-1].step for one in found if one.records), default=0)
    return last, tuple(one.cut for one in found if one.cut)


def last_checkpoint(folder: Path, world_size: int) -> int:
    """The step of the latest checkpoint that every rank has written; 0 where there is none."""
    ranks: dict[int, set[int]] = {}
    for path in folder.glob("checkpoint-*-rank*.pt"):
        if match := _CHECKPOINT.fullmatch(path.name):
            ranks.setdefault(int(match[1]), set()).add(int(match[2]))
    return max((step for step, those in ranks.items() if those >= set(range(world_size))), default=0)


def checkpoint_path(folder: Path, step: int, rank: int) -> Path:
    return folder / f"checkpoint-{step}-rank{rank}.pt"


def remove_checkpoints(folder: Path, rank: int, *, keep: int = 0) -> None:
    """A rank's own, but that of step ``keep``."""
    for path in folder.glob(f"checkpoint-*-rank{rank}.pt"):
        if path != checkpoint_path(folder, keep, rank):
            path.unlink(missing_ok=True)


def set_aside(folder: Path) -> None:
    """Move what a run left into ``previous``, in the place of what was there."""
    previous = folder / PREVIOUS
    shutil.rmtree(previous, ignore_errors=True)
    previous.mkdir()
    for path in list(folder.iterdir()):
        if path not in (previous, folder / LOCK):
            path.rename(previous / path.name)


def write_run(folder: Path, content: Mapping[str, Any]) -> None:
    """Replace ``run.json`` at once."""
    path = folder / RUN
    unfinished = path.with_name(f".{RUN}.{os.getpid()}")
    text = json.dumps({"schema": SCHEMA, "version": VERSION, **content}, indent=2) + "\n"
    try:
        unfinished.write_text(text, encoding="utf-8")
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)


def environment() -> dict[str, Any]:
    """Where this runs, and the variables that change what is computed."""
    from pytest_gputrain.origin import origin

    variables = {name: value for name, value in sorted(os.environ.items()) if _VARIABLES.match(name)}
    return {**origin(), "variables": variables}
