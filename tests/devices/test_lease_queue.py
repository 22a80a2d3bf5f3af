"""The order of the queue: who may go, who must wait, and that both come to an end."""

from __future__ import annotations

import heapq
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pytest_gputrain.devices.lease_queue import PATIENCE, Ticket, grants, in_order

EIGHT = tuple("abcdefgh")


def test_the_largest_goes_first_and_of_equals_the_longest() -> None:
    waiting = [
        Ticket(1, 1, EIGHT),
        Ticket(2, 4, EIGHT),
        Ticket(3, 4, EIGHT, seconds=9.0),
        Ticket(4, 8, EIGHT),
        Ticket(5, 4, EIGHT),
    ]
    assert [ticket.number for ticket in in_order(waiting)] == [4, 3, 2, 5, 1]


def test_a_large_request_keeps_what_comes_free() -> None:
    waiting = [Ticket(1, 8, EIGHT), Ticket(2, 1, EIGHT)]
    assert grants(waiting, "abc") == {}
    assert grants(waiting, EIGHT) == {1: EIGHT}


def test_what_the_large_one_cannot_use_is_not_kept_for_it() -> None:
    assert grants([Ticket(1, 2, ("a", "b")), Ticket(2, 1, EIGHT)], "ac") == {2: ("c",)}


def test_who_is_back_in_time_may_go_in_between() -> None:
    large, small = Ticket(1, 8, EIGHT), Ticket(2, 1, EIGHT, seconds=2.0)
    busy_for = dict.fromkeys("bcdefgh", 5.0)
    assert grants([large, small], "a", busy_for) == {2: ("a",)}
    assert grants([large, small], "a", dict.fromkeys("bcdefgh", 1.0)) == {}
    assert grants([large, small._replace(seconds=None)], "a", busy_for) == {}
    assert grants([large, small], "a", {"b": 5.0}) == {}  # nobody knows when the others come back


def test_nobody_goes_in_between_for_ever() -> None:
    large = Ticket(1, 8, EIGHT, waited=PATIENCE)
    assert grants([large, Ticket(2, 1, EIGHT, seconds=2.0)], "a", dict.fromkeys("bcdefgh", 5.0)) == {}


def test_a_small_one_is_not_passed_by_large_ones_for_ever() -> None:
    waiting = [Ticket(2, 8, EIGHT), Ticket(1, 1, EIGHT, waited=PATIENCE)]
    assert grants(waiting, EIGHT) == {1: ("a",)}


def test_a_small_request_leaves_the_gpu_that_another_one_needs() -> None:
    waiting = [Ticket(1, 1, ("a", "b"), seconds=9.0), Ticket(2, 1, ("a",))]
    assert grants(waiting, "ab") == {1: ("b",), 2: ("a",)}


def test_more_than_there_is_blocks_only_what_it_could_use() -> None:
    assert grants([Ticket(1, 3, ("a", "b")), Ticket(2, 1, ("c",))], "abc") == {2: ("c",)}


tickets = st.builds(
    lambda number, candidates, num_gpus, waited, seconds: Ticket(
        number, min(num_gpus, len(candidates)), tuple(candidates), waited, seconds
    ),
    number=st.integers(0, 10**6),
    candidates=st.lists(st.sampled_from(EIGHT), min_size=1, max_size=8, unique=True),
    num_gpus=st.integers(1, 8),
    waited=st.floats(0, 2 * PATIENCE),
    seconds=st.none() | st.floats(0, 10),
)


@given(
    st.lists(tickets, min_size=1, max_size=12, unique_by=lambda ticket: ticket.number),
    st.sets(st.sampled_from(EIGHT)),
    st.dictionaries(st.sampled_from(EIGHT), st.floats(0, 10)),
)
def test_what_always_holds(waiting: list[Ticket], free: set[str], remaining: dict[str, float]) -> None:
    given_out = grants(waiting, free, remaining)
    taken = [gpu for gpus in given_out.values() for gpu in gpus]
    assert len(taken) == len(set(taken)), "a GPU is given once"
    assert set(taken) <= free
    by_number = {ticket.number: ticket for ticket in waiting}
    for number, gpus in given_out.items():
        assert len(gpus) == by_number[number].num_gpus and set(gpus) <= set(by_number[number].candidates)
    first = in_order(waiting)[0]
    if len(free & set(first.candidates)) >= first.num_gpus:
        assert first.number in given_out, "who is first never waits for what is free"


def makespan(tests: list[tuple[int, float]], *, known: bool) -> float:
    """Seconds until all (GPUs, seconds) are done on 8 GPUs, by 8 workers that take the tests in order."""
    now, number, idle, free = 0.0, 0, 8, set(EIGHT)
    pending = list(tests)
    waiting: dict[int, tuple[int, float, float]] = {}
    running: list[tuple[float, int, tuple[str, ...]]] = []
    while pending or waiting or running:
        while idle and pending:
            number, idle = number + 1, idle - 1
            waiting[number] = (*pending.pop(0), now)
        queue = [
            Ticket(n, gpus, EIGHT, now - since, seconds if known else None)
            for n, (gpus, seconds, since) in waiting.items()
        ]
        left = {gpu: end - now for end, _, gpus in running for gpu in gpus} if known else {}
        for n, gpus in grants(queue, free, left).items():
            heapq.heappush(running, (now + waiting.pop(n)[1], n, gpus))
            free -= set(gpus)
        assert running, f"{len(waiting)} wait and nobody runs"
        now, _, gpus = heapq.heappop(running)
        free, idle = free | set(gpus), idle + 1
    return now


@pytest.mark.parametrize("known", [True, False], ids=["durations known", "first run"])
def test_gpus_are_kept_busy(known: bool) -> None:
    rng = random.Random(3)
    for _ in range(20):
        tests = [(rng.choice([1, 1, 1, 1, 2, 2, 4, 8]), rng.uniform(0.1, 1.0)) for _ in range(60)]
        tests.sort(key=lambda test: (-test[0], -test[1] if known else 0))
        bound = max(max(seconds for _, seconds in tests), sum(n * seconds for n, seconds in tests) / 8)
        assert makespan(tests, known=known) <= 1.15 * bound


def test_everybody_is_served_whatever_comes() -> None:
    rng = random.Random(5)
    for _ in range(20):
        tests = [(rng.choice([1, 1, 1, 2, 4, 8]), rng.choice([0.1, 1.0, 20.0])) for _ in range(40)]
        makespan(tests, known=rng.random() < 0.5)  # asserts that somebody can always go on
