"""What is given back after an out-of-memory."""

from __future__ import annotations

import weakref

import torch

from pytest_gputrain.memory.clean import release


class Kept:
    """Something that a frame holds."""


def fails(seen: list[weakref.ref[Kept]]) -> None:
    kept = Kept()
    seen.append(weakref.ref(kept))
    raise torch.OutOfMemoryError("CUDA out of memory")


def wraps(seen: list[weakref.ref[Kept]]) -> None:
    try:
        fails(seen)
    except RuntimeError:
        kept = Kept()
        seen.append(weakref.ref(kept))
        raise RuntimeError("step 3 failed") from None


def test_frames_of_all_that_an_exception_keeps_are_emptied() -> None:
    seen: list[weakref.ref[Kept]] = []
    try:
        wraps(seen)
    except RuntimeError as error:
        assert [reference() is not None for reference in seen] == [True, True]
        release(error)
    assert [reference() for reference in seen] == [None, None]


def test_gradients_are_dropped_and_optimizer_state_stays() -> None:
    model = torch.nn.Linear(2, 2)
    optimizer = torch.optim.Adam(model.parameters())
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    release(model=model, optimizer=optimizer)
    assert model.weight.grad is None
    assert optimizer.state[model.weight]["exp_avg"].shape == (2, 2)
    assert not torch.cuda.is_initialized()
