"""Every setting, said once: its option, its twins in environment and ini, what is legal, the default."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Literal, NamedTuple

from pytest_gputrain.values import LEGAL_FLAG, LEGAL_SECONDS, parse_flag, parse_seconds


class Setting(NamedTuple):
    """One row of the table below."""

    field: str
    option: str
    description: str
    legal: str
    parse: Callable[[str, Path], object]
    default: object
    metavar: str | None = None
    kind: Literal["value", "list", "flag"] = "value"

    @property
    def name(self) -> str:
        return "gputrain_" + self.option.removeprefix("--").removeprefix("gputrain-").replace("-", "_")

    @property
    def variable(self) -> str:
        return self.name.upper()

    @property
    def help(self) -> str:
        return f"{self.description} (environment: {self.variable}; ini: {self.name})"


def _parse_case(text: str, folder: Path) -> str:
    # Imported here: a session that gives no case does not pay for it.
    from pytest_gputrain.case.loading import split_spec

    return ":".join(split_spec(text, "case"))


def _parse_folder(text: str, folder: Path) -> Path:
    path = folder / Path(text).expanduser()
    # Its parents too: what is below a file would be accepted here and fail in the first launch.
    if not next(there for there in (path, *path.parents) if os.path.exists(there)).is_dir():
        raise ValueError
    return path


def _parse_count(text: str, folder: Path) -> int:
    number = int(text)
    if number < 0:
        raise ValueError
    return number


def _parse_seconds(text: str, folder: Path) -> float:
    return parse_seconds(text)


def _parse_flag(text: str, folder: Path) -> bool:
    return parse_flag(text)


SETTINGS = (
    Setting(
        "cases",
        "--gputrain-case",
        "training case that the shipped checks run on; may be given several times",
        "MODULE:ATTRIBUTE, such as my_project.cases:gpt",
        _parse_case,
        (),
        "MODULE:ATTR",
        "list",
    ),
    Setting(
        "report",
        "--gputrain-report",
        "folder that keeps the artifacts of every launch, by test",
        "a folder, there or not yet there",
        _parse_folder,
        None,
        "DIR",
    ),
    Setting(
        "require_gpus",
        "--require-gpus",
        "fail the session when fewer than N GPUs are found, or when no test marked gpu ran",
        "a number of GPUs, 0 (none required) or more",
        _parse_count,
        None,
        "N",
    ),
    Setting(
        "share_gpu",
        "--share-gpu",
        "where ranks outnumber GPUs, let them share through gloo instead of skipping the test; such results "
        "are labelled and never count for --require-gpus",
        LEGAL_FLAG,
        _parse_flag,
        False,
        kind="flag",
    ),
    Setting(
        "timeout",
        "--gputrain-timeout",
        "seconds that one launch may take before it is ended, with the stacks of all ranks",
        LEGAL_SECONDS,
        _parse_seconds,
        300.0,
        "SECONDS",
    ),
    Setting(
        "stall",
        "--gputrain-stall",
        "seconds without any progress after which a launch counts as hung",
        LEGAL_SECONDS,
        _parse_seconds,
        60.0,
        "SECONDS",
    ),
    Setting(
        "stability",
        "--stability",
        "run the tests marked stability too; without it, or a -m that names them, they are skipped",
        LEGAL_FLAG,
        _parse_flag,
        False,
        kind="flag",
    ),
    Setting(
        "lease_dir",
        "--gputrain-lease-dir",
        "folder through which the test runs of this host agree on who holds which GPU "
        "(default: gputrain-leases in the temporary folder)",
        "a folder, there or not yet there",
        _parse_folder,
        None,
        "DIR",
    ),
    Setting(
        "lease_timeout",
        "--gputrain-lease-timeout",
        "seconds that a test may wait for its GPUs, none of them its own; then it fails, with who holds them",
        LEGAL_SECONDS,
        _parse_seconds,
        3600.0,
        "SECONDS",
    ),
    Setting(
        "cache_dir",
        "--gputrain-cache-dir",
        "folder that keeps what batch-size discoveries measured (default: pytest-gputrain in the user's "
        "folder for caches)",
        "a folder, there or not yet there",
        _parse_folder,
        None,
        "DIR",
    ),
    Setting(
        "alone",
        "--gputrain-alone",
        "run tests marked distributed as one rank, in pytest's own process: for --pdb and breakpoint()",
        "true or false",
        _parse_flag,
        False,
        kind="flag",
    ),
)
