"""A block of training under a limit: what it says of the peak, and what an out-of-memory in it looks like."""

from __future__ import annotations

import pickle

import pytest
import torch

from pytest_gputrain import OutOfMemory
from pytest_gputrain.memory.guard import OomGuard

MIB = 2**20


def test_the_peak_is_the_sum_of_what_was_alive() -> None:
    with OomGuard() as guard:
        torch.empty(3 * MIB, dtype=torch.uint8)
        kept = torch.empty(2 * MIB, dtype=torch.uint8)
        kept.view(2, MIB)[0].fill_(1)
    assert guard.peak_bytes == 3 * MIB
    assert guard.oom is None


def test_an_operation_over_the_limit_raises_and_keeps_nothing() -> None:
    with pytest.raises(torch.OutOfMemoryError) as caught, OomGuard("4MiB") as guard:
        kept = torch.empty(3 * MIB, dtype=torch.uint8)
        torch.cat([kept, kept])
    error = caught.value
    assert isinstance(error, OutOfMemory) and str(guard.oom) == str(error)
    assert (error.requested, error.in_use, error.limit, error.device) == (6 * MIB, 3 * MIB, 4 * MIB, "cpu")
    assert guard.peak_bytes == 3 * MIB
    again = pickle.loads(pickle.dumps(error))
    assert (str(again), again.__dict__) == (str(error), error.__dict__)
