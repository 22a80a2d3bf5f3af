"""A program of ``_deadlocks.py`` as a ``MultiProcessTestCase``; arguments NAME FOLDER.

The test's own time limit is read from ``DISTRIBUTED_TESTS_DEFAULT_TIMEOUT``, 300 s unless set.
"""

from __future__ import annotations

import contextlib
import os
import sys
import unittest

import torch.distributed as dist
from torch.testing._internal.common_distributed import MultiProcessTestCase

from benchmarks._deadlocks import run


class HangingTest(MultiProcessTestCase):
    """Two ranks over gloo and a file store."""

    @property
    def world_size(self) -> int:
        return 2

    def setUp(self) -> None:
        super().setUp()
        self._spawn_processes()

    def tearDown(self) -> None:
        super().tearDown()
        with contextlib.suppress(OSError):
            os.remove(self.file_name)

    def test_program(self) -> None:
        store = dist.FileStore(  # type: ignore[attr-defined]
            self.file_name, self.world_size
        )
        dist.init_process_group("gloo", store=store, rank=self.rank, world_size=self.world_size)
        run(os.environ["DEADLOCK_NAME"], os.environ["DEADLOCK_FOLDER"])


if __name__ == "__main__":
    os.environ["DEADLOCK_NAME"], os.environ["DEADLOCK_FOLDER"] = sys.argv[1:3]
    outcome = unittest.TestResult()
    HangingTest("test_program").run(outcome)  # type: ignore[no-untyped-call]
    sys.exit(1 if outcome.failures or outcome.errors else 0)
