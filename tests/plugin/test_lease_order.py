"""In which order the tests of a session run."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pytest_gputrain.plugin.lease_order import CACHE_KEY, readable, spread

from .conftest import Run

MIXED = """
import pytest

def test_none(): pass

@pytest.mark.requires_gpus(1)
def test_one(): pass

@pytest.mark.requires_gpus(4)
def test_four(): pass

@pytest.mark.requires_gpus(1)
def test_one_more(): pass

@pytest.mark.requires_gpus(2)
def test_two(): assert not FAILS

FAILS = False

def test_none_more(): pass
"""


@pytest.fixture(autouse=True)
def _four_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GPUTRAIN_FAKE_GPUS", "4")


def order(result: pytest.RunResult) -> str:
    names = (re.match(r"test_it.py::test_(\w+) (?:PASSED|FAILED)", line) for line in result.outlines)
    return " ".join(name[1] for name in names if name)


def test_largest_first_else_as_collected(pytester: pytest.Pytester, run: Run) -> None:
    pytester.makepyfile(test_it=MIXED)
    assert order(run("-v")) == "four two one one_more none none_more"


def test_longest_first_where_an_earlier_run_has_shown_it(pytester: pytest.Pytester, run: Run) -> None:
    pytester.makepyfile(test_it=MIXED)
    run()
    kept = pytester.path / ".pytest_cache" / "v" / CACHE_KEY
    known = json.loads(kept.read_text())
    assert set(known) == {f"test_it.py::test_{name}" for name in ("one", "four", "one_more", "two")}
    kept.write_text(json.dumps({**known, "test_it.py::test_one_more": 7.0, "garbage": "x"}))
    assert order(run("-v")) == "four two one_more one none none_more"
    kept.write_text("garbage")
    assert order(run("-v")) == "four two one one_more none none_more"


def test_failed_first_keeps_its_say(pytester: pytest.Pytester, run: Run) -> None:
    pytester.makepyfile(test_it=MIXED.replace("FAILS = False", "FAILS = True"))
    run()
    # Of the two that need one GPU the one that took longer comes first.
    assert order(run("-v", "--ff")).replace("one_more one ", "one one_more ") == (
        "two four one one_more none none_more"
    )
    assert order(run("-v", "--lf")) == "two"


def test_stepwise_skips_nothing_that_has_not_run(pytester: pytest.Pytester, run: Run) -> None:
    pytester.makepyfile(test_it=MIXED.replace("FAILS = False", "FAILS = True"))
    assert order(run("-v", "--stepwise")) == "none one four one_more two"
    assert order(run("-v", "--stepwise")) == "two"


@given(st.integers(0, 200), st.integers(1, 16))
def test_spread_gives_each_worker_one_of_the_first(number: int, workers: int) -> None:
    items: list[Any] = list(range(number))
    dealt: list[Any] = spread(items, workers)
    assert sorted(dealt) == items
    if number >= 2 * workers:
        chunk = max(number // workers // 4, 2)  # what xdist's LoadScheduling hands out first
        assert [dealt[worker * chunk] for worker in range(workers)] == items[:workers]
        assert dealt[chunk * workers :] == items[chunk * workers :]


def test_only_numbers_are_believed() -> None:
    assert readable({"a": 1, "b": "2", "c": None, "d": -1, "e": float("inf"), "f": 0.5, "g": True}) == {
        "a": 1.0,
        "f": 0.5,
    }
    assert readable(["a"]) == {}
