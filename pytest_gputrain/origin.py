"""Where a figure was measured: every number that leaves this package carries this with it."""

from __future__ import annotations

import datetime
import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

# git answers in milliseconds; on a hung network file system a report without a commit is better than none.
GIT_TIMEOUT = 5.0


def origin(folder: Path | None = None) -> dict[str, str | int | None]:
    """Return the machine, the versions, the commit of ``folder`` and the time, as plain JSON.

    folder: the working directory where none is given.
    """
    from pytest_gputrain.devices import describe_found

    return {
        "gpus": describe_found(),
        "cpu": _cpu_model(),
        "cpu_cores": _cpu_cores(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": _version("torch"),
        "pytest_gputrain": _version("pytest-gputrain"),
        "commit": commit(folder or Path.cwd()),
        "time": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }


def commit(folder: Path) -> str | None:
    """Return the commit checked out in ``folder``, with ``+changes`` when files differ; None outside git."""
    head = _git(folder, "rev-parse", "--short=12", "HEAD")
    if not head:
        return None
    return head + ("+changes" if _git(folder, "status", "--porcelain", "--untracked-files=no") else "")


def _git(folder: Path, *arguments: str) -> str | None:
    command = ["git", "-C", str(folder), *arguments]
    try:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=GIT_TIMEOUT, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def _version(distribution: str) -> str | None:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return None  # a bare checkout


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "unknown")


def _cpu_cores() -> int:
    if hasattr(os, "sched_getaffinity"):  # what this process may use, where the system tells
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
