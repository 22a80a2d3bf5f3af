"""Whatever a case's functions change in this process while they are tried out is put back at the end."""

from __future__ import annotations

import contextlib
import copy
import gc
import io
import random
import sys
import warnings
from collections.abc import Iterator
from typing import Any

import torch

from pytest_gputrain.memory.fake_seam import quiet


@contextlib.contextmanager
def leaving_no_trace() -> Iterator[None]:
    """Random generators (torch, random, numpy), default device and type, gradient mode: as they were.

    So are loss scalers, which a step often keeps for itself between calls. Other tensors that it
    keeps are not: they may be fake from now on.
    """
    numpy = sys.modules.get("numpy")
    numbers = torch.get_rng_state(), random.getstate(), numpy.random.get_state() if numpy else None
    gradients, kind, device = torch.is_grad_enabled(), torch.get_default_dtype(), torch.get_default_device()
    torch.set_grad_enabled(True)
    scalers = {scaler: _copied(scaler) for scaler in _loss_scalers()}
    try:
        with warnings.catch_warnings(), quiet(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")  # what a run that only tries things out says misleads
            yield
    finally:
        for scaler, state in scalers.items():
            vars(scaler).clear()
            vars(scaler).update(state)
        torch.set_grad_enabled(gradients)
        torch.set_default_dtype(kind)
        if torch.get_default_device() != device:
            torch.set_default_device(None if device.type == "cpu" else device)
        torch.set_rng_state(numbers[0])
        random.setstate(numbers[1])
        if numpy and numbers[2] is not None:
            numpy.random.set_state(numbers[2])


def _loss_scalers() -> list[Any]:
    return [one for one in gc.get_objects() if issubclass(type(one), torch.amp.GradScaler)]


def _copied(scaler: Any) -> dict[str, Any]:
    """Its attributes, tables copied: they are written in place."""
    return {name: copy.copy(value) for name, value in vars(scaler).items()}
