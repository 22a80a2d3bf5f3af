"""A pytest plugin: writes when each test was done, in seconds, to the file named in the environment, as JSON.

    WHEN_DONE=FILE pytest -p benchmarks._test_times

What lies between two tests is what the later one cost, all hooks included; how long a session takes to
start does not come into it.
"""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

_done: list[float] = []


def pytest_runtest_logfinish() -> None:
    _done.append(time.perf_counter())


def pytest_sessionfinish() -> None:
    Path(os.environ["WHEN_DONE"]).write_text(json.dumps(_done), encoding="utf-8")
