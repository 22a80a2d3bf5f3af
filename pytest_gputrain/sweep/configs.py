"""Writing a plan's branches into a folder: all of them and their manifest, or nothing."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
from collections.abc import Iterator, Mapping
from pathlib import Path

from pytest_gputrain.sweep.branches import BranchPlan
from pytest_gputrain.sweep.config_file import SweepError, read_config
from pytest_gputrain.sweep.config_text import config_text
from pytest_gputrain.sweep.manifest import (
    CONFIG_NAME,
    FORMAT,
    MANIFEST,
    VERSION,
    Manifest,
    digest,
    read_manifest,
)

__all__ = ["SweepError", "check_folder", "read_config", "read_manifest", "write_configs"]


def write_configs(
    plan: BranchPlan, folder: Path | str, *, force: bool = False, max_device_batch_source: str = "given"
) -> Manifest:
    """Write one configuration a branch and ``manifest.json``; return the manifest as it is read back.

    The folder is made where it is missing. The same plan may be written again. One that holds another plan is
    refused; with ``force`` that plan's files go, and nothing else. Raises SweepError with one line, and has
    written nothing then.
    """
    folder = Path(folder)
    texts = _texts(plan, max_device_batch_source)
    there = _planned_in(folder)
    if not there or not _holds(folder, texts, there):
        _refuse_occupied(folder, there, force=force)
        with _told(folder), _made(folder):
            _replace(folder, texts, stale=there - texts.keys())
            _check_alone(folder, texts)
    return read_manifest(folder)


def check_folder(folder: Path | str, *, force: bool = False) -> None:
    """Raise SweepError where ``write_configs`` would, before work that takes long; leaves no trace."""
    folder = Path(folder)
    _refuse_occupied(folder, _planned_in(folder), force=force)
    made: list[Path] = []
    with _told(folder):
        try:
            made = _make(folder)
            _write(probe := _unfinished(folder, MANIFEST), b"")
            probe.unlink()
        finally:
            _remove_folders(made)


def _texts(plan: BranchPlan, source: str) -> dict[str, bytes]:
    """Content by file name, the manifest last."""
    texts = {f"{branch.name}.py": config_text(branch, plan).encode() for branch in plan}
    document = {
        "format": FORMAT,
        "version": VERSION,
        "base": {
            "name": plan.base_name,
            "batch": plan.base_batch,
            "learning_rate": plan.base_lr,
            "lr_scaling": plan.lr_scaling,
            "block_size": plan.block_size,
            "tokens": plan.tokens,
            "tokens_asked": plan.tokens_asked,
            "world_size": plan.world_size,
            "max_device_batch": plan.max_device_batch,
            "max_device_batch_source": source,
        },
        "branches": [
            {"k": branch.k, "name": branch.name, "config": name, "sha256": digest(texts[name])}
            for branch, name in zip(plan, texts, strict=True)
        ],
    }
    return {**texts, MANIFEST: (json.dumps(document, indent=2) + "\n").encode()}


def _planned_in(folder: Path) -> set[str]:
    """The names in the folder that are a plan's."""
    try:
        names = os.listdir(folder)
    except OSError:  # not there, or no folder: making it will tell
        return set()
    return {name for name in names if name == MANIFEST or CONFIG_NAME.fullmatch(name)}


def _holds(folder: Path, texts: Mapping[str, bytes], there: set[str]) -> bool:
    """Whether the folder holds exactly these files already."""
    if there != texts.keys():
        return False
    try:
        return all((folder / name).read_bytes() == text for name, text in texts.items())
    except OSError:
        return False


def _refuse_occupied(folder: Path, there: set[str], *, force: bool) -> None:
    if os.path.exists(folder) and not os.path.isdir(folder):
        raise SweepError(f"{folder} is a file; give a folder, there or not yet there, by --out")
    for name in sorted(there):
        if (folder / name).is_dir():
            raise SweepError(
                f"{folder / name} is a folder, where a file of the plan would be; give another --out"
            )
    if there and not force:
        raise SweepError(
            f"{folder} holds another plan ({len(there)} files, {min(there)} among them); "
            "give another --out, or --force to replace it"
        )


@contextlib.contextmanager
def _told(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        why = error.strerror or str(error)
        raise SweepError(f"{folder} cannot be written ({why}); give a folder that can be, by --out") from None


@contextlib.contextmanager
def _made(folder: Path) -> Iterator[None]:
    """The folder, there; gone again, with what was made above it, when what is done in it fails."""
    made = _make(folder)
    try:
        yield
    except BaseException:
        _remove_folders(made)
        raise


def _make(folder: Path) -> list[Path]:
    """Make the folder and those above it; return the ones that were missing, the lowest first."""
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except BaseException:
        _remove_folders(missing)
        raise
    return missing


def _remove_folders(folders: list[Path]) -> None:
    for path in folders:
        with contextlib.suppress(OSError):  # somebody else has put something there
            path.rmdir()


def _replace(folder: Path, texts: Mapping[str, bytes], *, stale: set[str]) -> None:
    """Put the files into place. Whatever can go wrong (rights, a full disk) does so before the old plan goes.

    A folder without a manifest holds no plan. So the old one goes first and the new one comes last: who dies
    in between leaves no plan, never a mixture of two.
    """
    staged: dict[str, Path] = {}
    placed: list[Path] = []
    try:
        for name, text in texts.items():
            staged[name] = _unfinished(folder, name)
            _write(staged[name], text)
        (folder / MANIFEST).unlink(missing_ok=True)
        for name in stale:
            (folder / name).unlink(missing_ok=True)
        for name, path in staged.items():
            placed.append(folder / name)
            path.replace(folder / name)
    except BaseException:
        for path in (*placed, *staged.values()):
            with contextlib.suppress(OSError):
                path.unlink()
        raise


def _check_alone(folder: Path, texts: Mapping[str, bytes]) -> None:
    """Whether another plan came in between. Whoever writes its manifest last sees what both have left, so a
    mixture of them never stays.
    """
    if _holds(folder, texts, _planned_in(folder)):
        return
    with contextlib.suppress(SweepError):  # what cannot be read is no plan anyway
        if any(branch.edited for branch in read_manifest(folder)):
            (folder / MANIFEST).unlink(missing_ok=True)
    raise SweepError(f"{folder}: another plan was written there at the same time; plan again")


def _unfinished(folder: Path, name: str) -> Path:
    """What a file is called until it is whole."""
    return folder / f".{name}.{secrets.token_hex(4)}.tmp"


def _write(path: Path, text: bytes) -> None:
    """Write a new file, on the disk before it gets its name. Raises OSError."""
    with path.open("xb") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
