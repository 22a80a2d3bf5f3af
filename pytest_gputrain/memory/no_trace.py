"""Whatever a case's functions change in this process while they are tried out is put back at the end."""

from __future__ import annotations

import contextlib
import io
import random
import sys
import warnings
from collections.abc import Iterable, Iterator
from typing import Any

import torch

from pytest_gputrain.memory.fake_seam import quiet
from pytest_gputrain.memory.remembered import Remembered


@contextlib.contextmanager
def leaving_no_trace(functions: Iterable[Any]) -> Iterator[Remembered]:
    """Random generators (torch, random, numpy), default device and type, gradient mode: as they were.

    So is what the functions keep between calls, and what is added to the `Remembered`. What they print and
    warn of meanwhile is not shown: a loss of 1.000 misleads, and the real run says it again.
    """
    numpy = sys.modules.get("numpy")
    numbers = torch.get_rng_state(), random.getstate(), numpy.random.get_state() if numpy else None
    gradients, kind, device = torch.is_grad_enabled(), torch.get_default_dtype(), torch.get_default_device()
    torch.set_grad_enabled(True)
    remembered = Remembered()
    remembered.add(functions)
    try:
        with warnings.catch_warnings(), quiet(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield remembered
    finally:
        remembered.put_back()
        torch.set_grad_enabled(gradients)
        torch.set_default_dtype(kind)
        if torch.get_default_device() != device:
            torch.set_default_device(None if device.type == "cpu" else device)
        torch.set_rng_state(numbers[0])
        random.setstate(numbers[1])
        if numpy and numbers[2] is not None:
            numpy.random.set_state(numbers[2])
