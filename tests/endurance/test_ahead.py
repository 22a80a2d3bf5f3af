"""A run is ended early only where memory that grows will certainly not last to its end."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest

from pytest_gputrain.endurance.ahead import KIND, Outlook, joined
from pytest_gputrain.endurance.findings import Finding

MB = 1024**2
LAST = 10_000
FREE = 4000 * MB


def first_said(taken: Callable[[int], float], *, last: int = LAST) -> Finding | None:
    """taken: bytes by step. Beside it 50 MiB come and go."""
    noise = random.Random(0)
    outlook = Outlook("memory", lambda taken: FREE - taken, last)
    for step in range(1, last + 1):
        value = 900 * MB + taken(step) + 50 * MB * noise.random()
        if found := outlook.add(step, value, 1):
            return found
    return None


def test_a_leak_that_will_not_fit_ends_the_run_before_memory_does() -> None:
    found = first_said(lambda step: 2 * MB * step)
    assert found is not None
    assert found.step is not None
    assert (found.kind, found.rank) == (KIND, 1)
    assert 1450 <= found.step < 1800
    assert found.figures["full_at"] == pytest.approx(2000, rel=0.05)
    first, middle, last = found.message.split(", ")
    assert first.startswith("memory will not last on rank 1: 2.0 MiB more a step from step ")
    assert middle.endswith(f" left after step {found.step}")
    assert last == (
        f"so that about step {found.figures['full_at']} of {LAST} would be the last one; the run is ended "
        "here"
    )


HEALTHY: dict[str, Callable[[int], float]] = {
    "steady": lambda step: 0,
    "a leak that fits": lambda step: 0.38 * MB * step,
    "a cache of two thirds": lambda step: 2 * MB * min(step, 1350),
    "filled at once": lambda step: 3900 * MB * (step > 300),
    "comes and goes": lambda step: 8 * MB * (step % 350),
}


@pytest.mark.parametrize("name", HEALTHY)
def test_what_fits_goes_on(name: str) -> None:
    assert first_said(HEALTHY[name]) is None


def test_a_run_that_is_nearly_done_goes_on() -> None:
    assert first_said(lambda step: 2 * MB * step, last=1850) is None


def said_by(rank: int, full_at: int) -> Finding:
    message = f"memory will not last on rank {rank}: 2.0 MiB more a step from step 9 on, and so on"
    return Finding(KIND, 40, rank, message, {"full_at": full_at})


def test_ranks_whose_memory_will_not_last_are_told_together() -> None:
    victim = Finding("victim", 40, 2, "")
    found = joined({0: said_by(0, 90), 1: said_by(1, 80), 2: victim})
    assert found is not None
    assert (found.rank, found.figures["full_at"]) == (None, 80)
    assert found.message.startswith(
        "memory will not last on ranks 0-1: up to 2.0 MiB more a step from step 9"
    )
    every = joined({0: said_by(0, 90), 1: said_by(1, 80)})
    assert every is not None
    assert every.message.startswith("memory will not last on every rank: up to 2.0 MiB more a step")


def test_one_rank_alone_or_something_else_is_told_as_it_is() -> None:
    assert joined({0: said_by(0, 90), 1: None}) is None
    assert joined({0: said_by(0, 90), 1: said_by(1, 80), 2: Finding("not_finite", 40, 2, "nan")}) is None
    assert joined({}) is None
