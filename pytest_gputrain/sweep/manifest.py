"""``manifest.json``: which branches a folder holds. What it does not name is not run, whatever lies there."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pytest_gputrain.sweep.config_file import SweepError, parse_config, read_file

__all__ = ["Manifest", "PlannedBranch", "SweepError", "read_manifest"]

MANIFEST = "manifest.json"
FORMAT, VERSION = "pytest-gputrain branches", 1
# Plain names in the folder of the manifest, so that logs and results named after them stay in theirs.
CONFIG_NAME = re.compile(r"branch_k[1-9][0-9]*\.py")
# What the branches come from, and its types in JSON.
BASE: Mapping[str, type | tuple[type, ...]] = {
    "name": str,
    "batch": int,
    "learning_rate": (int, float),
    "lr_scaling": str,
    "block_size": int,
    "tokens": int,
    "tokens_asked": int,
    "world_size": int,
    "max_device_batch": int,
    "max_device_batch_source": str,
}
_PLAN_AGAIN = "plan again with gputrain branches plan --force"


@dataclass(frozen=True, kw_only=True)
class PlannedBranch:
    """A branch as its configuration says now.

    values: names and values of the configuration, checked. sha256: of the file. edited: it is not what was
    planned any more; its numbers still agree with each other.
    """

    k: int
    name: str
    config: Path
    values: Mapping[str, Any]
    sha256: str
    edited: bool


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """The branches planned into ``folder``, in their order; iterates over them. base: as in ``BASE``."""

    folder: Path
    base: Mapping[str, Any]
    branches: tuple[PlannedBranch, ...]

    def __iter__(self) -> Iterator[PlannedBranch]:
        return iter(self.branches)

    def __len__(self) -> int:
        return len(self.branches)

    @property
    def tokens(self) -> int:
        """Tokens that each branch sees."""
        return int(self.base["tokens"])


def read_manifest(folder: Path | str) -> Manifest:
    """Read the manifest of ``folder`` and every configuration that it names.

    Raises SweepError with one line: no plan there, not a plan's manifest, a configuration that is gone, is no
    Python, or does not agree with itself or with the budget that all branches share.
    """
    folder = Path(folder)
    document = _document(folder)
    base = document["base"]
    branches = tuple(_branch(folder, entry) for entry in document["branches"])
    for branch in branches:
        if branch.values["tokens"] != base["tokens"]:
            raise SweepError(
                f"{branch.config}: {branch.values['tokens']} tokens, but every branch has to see "
                f"{base['tokens']} to be compared; mend it, or {_PLAN_AGAIN}"
            )
    return Manifest(folder=folder, base=base, branches=branches)


def digest(data: bytes) -> str:
    """Return what the manifest keeps of a configuration, to know an edited one."""
    return hashlib.sha256(data).hexdigest()


def _document(folder: Path) -> dict[str, Any]:
    """The manifest's JSON, of the right shape."""
    path = folder / MANIFEST
    if not path.exists():
        there = "there is no such folder" if not folder.exists() else f"it holds no {MANIFEST}"
        raise SweepError(f"{folder}: {there}; gputrain branches plan --out {folder} writes one")
    data = read_file(path)
    try:
        document = json.loads(data)
    except (ValueError, RecursionError):
        raise SweepError(f"{path} is not JSON; {_PLAN_AGAIN}") from None
    if not isinstance(document, dict) or document.get("format") != FORMAT:
        raise SweepError(f"{path} was not written by gputrain branches plan; give a folder that it wrote")
    if document.get("version") != VERSION:
        raise SweepError(
            f"{path} has version {document.get('version')!r}, this reads {VERSION}; {_PLAN_AGAIN}"
        )
    if wrong := _wrong_shape(document):
        raise SweepError(f"{path}: {wrong}; {_PLAN_AGAIN}")
    return document


def _wrong_shape(document: Mapping[str, Any]) -> str | None:
    base, entries = document.get("base"), document.get("branches")
    if not isinstance(base, dict):
        return "base is missing"
    for key, kind in BASE.items():
        if not isinstance(base.get(key), kind) or isinstance(base[key], bool):
            return f"base.{key} is missing or not what it was"
    if not isinstance(entries, list) or not entries:
        return "it names no branch"
    for number, entry in enumerate(entries):
        if not isinstance(entry, dict) or not isinstance(entry.get("sha256"), str):
            return f"branches[{number}] is no branch"
        k, name, config = entry.get("k"), entry.get("name"), entry.get("config")
        if (
            type(k) is not int
            or name != f"branch_k{k}"
            or config != f"{name}.py"
            or not CONFIG_NAME.fullmatch(config)
        ):
            return f"branches[{number}] is not named after its k"
    if len({entry["k"] for entry in entries}) < len(entries):
        return "it names a branch twice"
    return None


def _branch(folder: Path, entry: Mapping[str, Any]) -> PlannedBranch:
    path = folder / entry["config"]
    data = read_file(path)
    values = parse_config(data, path)
    if values["k"] != entry["k"]:
        raise SweepError(
            f"{path}: k is {values['k']}, the manifest's is {entry['k']}; mend it, or {_PLAN_AGAIN}"
        )
    sha256 = digest(data)
    return PlannedBranch(
        k=entry["k"],
        name=entry["name"],
        config=path,
        values=values,
        sha256=sha256,
        edited=sha256 != entry["sha256"],
    )
