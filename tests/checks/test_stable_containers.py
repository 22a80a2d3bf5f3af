"""Which of a program's containers grew: who holds what is no tensor."""

from __future__ import annotations

from collections import deque
from typing import Any

import pytest

from pytest_gputrain.checks.stable_containers import Lengths, holder_of


class Program:
    def __init__(self, log: Any) -> None:
        self.log, self.fixed, self.few = log, [*range(1000)], [*range(10)]


def fill(log: Any, first: int, last: int) -> None:
    for number in range(first, last):
        if isinstance(log, dict):
            log[number] = (f"step {number}", number)
        elif isinstance(log, set):
            log.add(number)
        else:
            log.append({"step": number})


@pytest.mark.parametrize("kind", [list, dict, set, deque])
def test_the_container_that_grew_is_named_with_its_length(kind: type) -> None:
    known = {"case": (program := Program(kind()))}
    fill(program.log, 0, 20)
    then = Lengths(20)
    fill(program.log, 20, 120)
    program.few.append(1)  # less than one in 25 steps
    grown = {id(one) for one in then.grown(100)}
    assert id(program.log) in grown
    assert not grown & {id(program.fixed), id(program.few)}
    del program
    said = holder_of([one for one in then.grown(100) if one is known["case"].log], known)
    assert ".log in " in said
    assert said.endswith(f" ({kind.__name__} of 120)")


def test_what_takes_more_comes_first() -> None:
    numbers: list[Any] = [1.0] * 4
    records: list[Any] = [{"a": 1.0}] * 4
    then = Lengths(1)
    for number in range(100):
        numbers.append(float(number))
        records.append({"a": float(number), "b": [number, number], "c": {}})
    grown = [id(one) for one in then.grown(100)]
    assert grown.index(id(records)) < grown.index(id(numbers))


def test_nothing_grew() -> None:
    program = Program([])
    assert not [one for one in Lengths(1).grown(100) if one is program.log]
    assert holder_of([], {"case": program}) == ""


def test_what_watches_a_run_is_not_named() -> None:
    from pytest_gputrain.endurance.heap import HeapMeter

    watcher: Any = HeapMeter(1)
    watcher.kept = [*range(10)]
    assert holder_of([watcher.kept], {"case": Program(watcher)}) == ""
