"""What is given back after an out-of-memory."""

from __future__ import annotations

import weakref

import psutil
import pytest
import torch

from pytest_gputrain.memory import clean
from pytest_gputrain.memory.clean import release
from pytest_gputrain.memory.guard import OomGuard


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


def test_a_backward_that_ran_out_is_forgotten() -> None:
    """torch keeps the rest of it, graph and all, until another backward runs in that thread."""
    weight = torch.nn.Parameter(torch.randn(64, 16))
    inputs = torch.randn(6, 64, 8)

    def scan() -> torch.Tensor:
        decay = torch.exp(weight[None, :, None, :] * inputs[..., None])
        state, outputs = torch.zeros(6, 64, 16), []
        for position in range(8):
            state = decay[:, :, position] * state + inputs[:, :, position, None]
            outputs.append(state.sum(-1))
        return torch.stack(outputs).sum()

    with OomGuard() as whole:
        scan().backward()
    weight.grad = None
    with OomGuard() as around:
        with pytest.raises(torch.OutOfMemoryError), OomGuard(whole.peak_bytes - 1024):
            scan().backward()
        weight.grad = None
        assert around.made_bytes == 0


@pytest.mark.skipif(clean._malloc_trim() is None, reason="not glibc")
def test_the_host_gets_memory_back_that_lies_below_what_is_in_use() -> None:
    process = psutil.Process()
    freed = [torch.ones(16_000) for _ in range(1000)]  # 64 MB, in pieces that come from the heap
    above = torch.ones(16_000)
    full = process.memory_info().rss
    del freed
    release()
    assert process.memory_info().rss < full - 32 * 10**6
    assert above.sum() == 16_000
