"""PyTorch's own warm ranks: a ``MultiProcContinuousTest``, whose processes live as long as the class.

A module of its own, because importing its base class takes longer than importing torch, and every process
that it spawns does so again. Needs ``expecttest``, which PyTorch's test utilities import.
"""

from __future__ import annotations

import logging
import os
import unittest

# Read when the module below is imported; its own default is 300 s.
os.environ.setdefault("DISTRIBUTED_TESTS_DEFAULT_TIMEOUT", "120")

from torch.testing._internal.common_distributed import MultiProcContinuousTest

from benchmarks._rivals import WORLD_SIZE, all_reduce_once

logging.getLogger(MultiProcContinuousTest.__module__).setLevel(logging.WARNING)


class AllReduceTest(MultiProcContinuousTest):
    """One all_reduce over gloo, by processes that stay."""

    world_size = WORLD_SIZE

    @classmethod
    def backend_str(cls) -> str:
        return "gloo"

    @classmethod
    def device_type(cls) -> str:
        return "cpu"

    def test_all_reduce(self) -> None:
        all_reduce_once()


def run_test() -> None:
    """Run the test once, by the processes there are. Raises AssertionError if it is not green."""
    result = unittest.TestResult()
    AllReduceTest("test_all_reduce").run(result)  # type: ignore[no-untyped-call]
    assert result.wasSuccessful() and result.testsRun == 1, result.failures + result.errors


def end() -> None:
    """End the processes."""
    AllReduceTest.tearDownClass()  # type: ignore[no-untyped-call]
