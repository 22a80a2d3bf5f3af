"""Every test in this folder must leave the machine as it found it."""

from __future__ import annotations

import gc
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from pytest_gputrain.launch import warm

# Set by the first import of dynamo in a process, which may come in any test.
FIRST_IMPORT = "TORCHINDUCTOR_CACHE_DIR"


def _grandchildren() -> list[str]:
    """Command lines of all that runs below this process's children, which are fork servers.

    Warm ranks that wait for a call are meant to be there.
    """
    found = []
    idle = warm.POOL.pids()
    for child in psutil.Process().children():
        for process in child.children(recursive=True):
            try:
                if process.pid not in idle:
                    found.append(f"{process.pid} {' '.join(process.cmdline())[:100]}")
            except psutil.Error:
                continue
    return found


def _folders() -> set[Path]:
    places = (tempfile.gettempdir(), "/dev/shm")
    return {found for place in places for found in Path(place).glob(f"gputrain-{os.getpid()}-*")}


@pytest.fixture(autouse=True)
def _nothing_left_behind() -> Iterator[None]:
    environ, folders = dict(os.environ), _folders()  # those that the report of a failed test holds
    yield
    environ["PYTEST_CURRENT_TEST"] = os.environ.get("PYTEST_CURRENT_TEST", "")
    if FIRST_IMPORT in os.environ:
        environ.setdefault(FIRST_IMPORT, os.environ[FIRST_IMPORT])
    assert dict(os.environ) == environ
    assert _grandchildren() == []
    gc.collect()  # a LaunchResult removes its folder when it goes
    assert _folders() - folders == set()
