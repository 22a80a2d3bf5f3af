"""An answer from the cache where less memory is free than when it was measured: one probe tells."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from pytest_gputrain import discover_batch_size, find_batch
from pytest_gputrain.batch import probe_target
from pytest_gputrain.batch.cache import BatchCache
from pytest_gputrain.batch.cached_search import Known, Measures, Probe, search_through
from pytest_gputrain.batch.discovered import Discovered
from pytest_gputrain.batch.search import SearchResult, find_maximum
from tests.batch.models import case_of, mlp, rows

Free = Callable[[int], None]
MB = 10**6


@pytest.fixture
def free(monkeypatch: pytest.MonkeyPatch) -> Free:
    """The host says that so much is free."""
    return lambda size: monkeypatch.setattr(probe_target, "memory_of", lambda device: (size, 2**40))


class Ask:
    """``find_batch`` on one cache; ``probed``: the sizes that the last call ran."""

    def __init__(self, folder: Path) -> None:
        self.cache = BatchCache(folder)
        self.probed: list[int] = []

    def __call__(self, **options: Any) -> Discovered:
        self.probed = []
        case = case_of(mlp, batch=wide)
        return find_batch(case, cache=self.cache, on_probe=self._told, **{"max_batch_size": 4096, **options})

    def _told(self, size: int, peak: float | None, seconds: float) -> None:
        self.probed.append(size)


@pytest.fixture
def ask(tmp_path: Path) -> Ask:
    return Ask(tmp_path)


def wide(batch_size: int, device: Any) -> torch.Tensor:
    return rows(batch_size, device, 64)


def test_one_probe_confirms_where_less_is_free(ask: Ask, free: Free) -> None:
    free(20 * MB)
    first = ask(max_batch_size=16)
    for less, probed in ((20 * MB, []), (30 * MB, []), (19_500_000, []), (10 * MB, [16])):
        free(less)
        found = ask(max_batch_size=16)
        assert (found.size, found.source, ask.probed) == (first.size, "cache", probed)


def test_a_confirmed_size_is_a_hit_by_its_line(
    tmp_path: Path, free: Free, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="pytest_gputrain.batch")
    case = case_of(mlp, batch=wide)
    for size in (20 * MB, 10 * MB):
        free(size)
        discover_batch_size(None, 1, "cpu", case=case, max_batch_size=16, use_cache=True, cache_dir=tmp_path)
    assert caplog.messages[-1] == "Cache hit! Using cached batch size 16"


def test_a_given_capacity_counts_whatever_the_host_has_free_beside_it(ask: Ask, free: Free) -> None:
    free(100 * MB)
    first = ask(capacity="2MB")
    for less, probed in ((50 * MB, []), (MB, [first.size])):
        free(less)
        found = ask(capacity="2MB")
        assert (found.size, found.source, ask.probed) == (first.size, "cache", probed)


class Through:
    """``search_through`` on a GPU of 1000 bytes by a line of peaks: (size, from the cache, runs)."""

    def __init__(self, folder: Path) -> None:
        self.cache = BatchCache(folder)

    def __call__(self, free: int, per_sample: float, maximum: int = 256) -> tuple[int, bool, list[int]]:
        ran: list[int] = []

        def probe(size: int) -> float | None:
            ran.append(size)
            return per_sample * size if per_sample * size <= min(free, 1000) else None

        def search(probe: Probe, known: Known) -> SearchResult:
            return find_maximum(probe, maximum=maximum, capacity=1000, known=known)

        measures = Measures(1000, 1200, free, on_gpu=True, accounted=False)
        found = search_through(self.cache, {"key": 1}, search, probe, measures)
        return found.result.size, found.from_cache, ran


@pytest.fixture
def through(tmp_path: Path) -> Through:
    return Through(tmp_path)


def test_an_answer_that_does_not_hold_is_searched_anew(through: Through) -> None:
    assert through(2000, 10)[:2] == (100, False)
    assert through(2000, 30) == (100, True, [])  # as much is free: believed, though it would not fit
    size, from_cache, ran = through(1500, 30)
    assert (size, from_cache, ran[0], ran.count(100)) == (33, False, 100, 1)
    assert through(1500, 30) == (33, True, [])


def test_what_is_known_serves_another_bound_but_is_run_where_less_is_free(
    through: Through,
) -> None:
    assert through(2000, 10, maximum=50)[:2] == (50, False)
    assert through(2000, 10, maximum=50)[2] == []
    # 51 is not known, and known sizes around the answer were measured with more memory free.
    size, _, ran = through(1500, 20, maximum=51)
    assert (size, 50 in ran) == (50, True)
    assert through(1500, 20, maximum=51) == (50, True, [])


def test_a_size_that_ran_out_where_memory_was_scarce_is_tried_again_where_it_is_not(
    through: Through,
) -> None:
    assert through(900, 30)[0] == 30
    assert through(900, 10) == (30, True, [])
    assert through(2000, 10)[0] == 100
