"""In which order a session runs its tests: the largest requests for GPUs first, of equals the longest.

What needs many GPUs comes while there are many to have, and the small tests at the end fill what is left.
Tests that need no GPU keep their order, behind the others. ``--ff``, ``--nf`` and ``--lf`` come after this
and keep their say; with ``--stepwise``, which takes the order of collection for that of the run, nothing is
moved.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

import pytest

# How long each test held its GPUs, from run to run, below pytest's cache folder.
CACHE_KEY = "gputrain/lease-seconds"
MOST_KEPT = 20_000

# What the controller tells its workers: all of them must come to the same order.
SECONDS_INPUT = "gputrain_lease_seconds"
DIST_INPUT = "gputrain_dist"

_SECONDS = pytest.StashKey[dict[str, float]]()


def order(config: pytest.Config, items: list[pytest.Item], needs: Mapping[pytest.Item, int]) -> None:
    """Put the tests in order, in place. ``needs``: how many GPUs each will hold, 0 if it will be skipped."""
    if not any(needs.values()) or config.getoption("stepwise", False):
        return
    gpu_items = [item for item in items if needs[item]]
    gpu_items.sort(key=lambda item: (-needs[item], -(expected(item) or 0.0)))
    ordered = [*gpu_items, *(item for item in items if not needs[item])]
    workerinput: dict[str, Any] = getattr(config, "workerinput", {})
    if workerinput.get(DIST_INPUT) == "load":
        ordered = spread(ordered, int(workerinput.get("workercount", 1)))
    items[:] = ordered


def spread(items: list[pytest.Item], num_workers: int) -> list[pytest.Item]:
    """Return the tests so that xdist's first hand-out gives each worker one of the first ``num_workers``.

    xdist's ``load`` starts with a run of consecutive tests for each worker, a quarter of its share and at
    least two: the first worker would get all the large ones, to run one after the other among the others'
    small ones.
    """
    if len(items) < 2 * num_workers:
        return items  # handed out one by one, in turn
    chunk = max(len(items) // num_workers // 4, 2)
    first = items[: chunk * num_workers]
    dealt = [item for worker in range(num_workers) for item in first[worker::num_workers]]
    return dealt + items[len(first) :]


def expected(item: pytest.Item) -> float | None:
    """Return how long the test held its GPUs the last time, None when that is not known."""
    config = item.config
    if _SECONDS not in config.stash:
        config.stash[_SECONDS] = _known(config)
    return config.stash[_SECONDS].get(item.nodeid)


def _known(config: pytest.Config) -> dict[str, float]:
    workerinput: dict[str, Any] | None = getattr(config, "workerinput", None)
    if workerinput is not None:
        return readable(json.loads(workerinput.get(SECONDS_INPUT, "{}")))
    cache = _cache(config)
    return readable(cache.get(CACHE_KEY, {})) if cache is not None else {}


def _cache(config: pytest.Config) -> pytest.Cache | None:
    return getattr(config, "cache", None)  # not there at all with -p no:cacheprovider


def readable(given: object) -> dict[str, float]:
    """Return what can be believed of a file that anything may have written."""
    if not isinstance(given, dict):
        return {}
    return {
        name: float(value)
        for name, value in given.items()
        if isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value < math.inf
    }


def tell_worker(config: pytest.Config, workerinput: dict[str, Any]) -> None:
    """In the controller: what the worker needs for the same order as all others. Read once a session."""
    if _SECONDS not in config.stash:
        config.stash[_SECONDS] = _known(config)
    workerinput[SECONDS_INPUT] = json.dumps(config.stash[_SECONDS])
    workerinput[DIST_INPUT] = config.getoption("dist")


def remember(config: pytest.Config, seconds: dict[str, float]) -> None:
    """Keep how long tests held their GPUs, for the next run."""
    cache = _cache(config)
    if cache is None or not seconds:
        return
    known = {**readable(cache.get(CACHE_KEY, {})), **seconds}
    cache.set(CACHE_KEY, dict([*known.items()][-MOST_KEPT:]))
