"""PyTorch's own way: a ``MultiProcessTestCase`` as written in PyTorch's tests, run by unittest.

A module of its own, because importing its base class takes twice as long as importing torch, and every
process that it spawns does so again. Needs ``expecttest``, which PyTorch's test utilities import.
"""

from __future__ import annotations

import contextlib
import logging
import os
import unittest

# Read when the module below is imported; its own default is 300 s.
os.environ.setdefault("DISTRIBUTED_TESTS_DEFAULT_TIMEOUT", "120")

import torch.distributed as dist
from torch.testing._internal.common_distributed import MultiProcessTestCase

from benchmarks._rivals import WORLD_SIZE, all_reduce_once

logging.getLogger(MultiProcessTestCase.__module__).setLevel(logging.WARNING)  # it tells of every process


class AllReduceTest(MultiProcessTestCase):
    """One all_reduce over gloo and a file store."""

    @property
    def world_size(self) -> int:
        return WORLD_SIZE

    def setUp(self) -> None:
        super().setUp()
        self._spawn_processes()

    def tearDown(self) -> None:
        super().tearDown()
        with contextlib.suppress(OSError):
            os.remove(self.file_name)

    def test_all_reduce(self) -> None:
        store = dist.FileStore(  # type: ignore[attr-defined]
            self.file_name, self.world_size
        )
        dist.init_process_group("gloo", store=store, rank=self.rank, world_size=self.world_size)
        all_reduce_once()


def run_case() -> None:
    """Run the test once. Raises AssertionError with its text if it is not green."""
    result = unittest.TestResult()
    AllReduceTest("test_all_reduce").run(result)  # type: ignore[no-untyped-call]
    assert result.wasSuccessful() and result.testsRun == 1, result.failures + result.errors
