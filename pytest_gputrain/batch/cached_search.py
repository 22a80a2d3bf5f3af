"""A search that starts from what was measured before, and measures what is missing one process at a time.

The cache holds peaks, not answers: whether they pin an answer down under this limit is for the search to say.
Imports no torch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from pytest_gputrain.batch.cache_entry import Entry

if TYPE_CHECKING:
    from pytest_gputrain.batch.cache import BatchCache
    from pytest_gputrain.batch.discovered import Discovered
    from pytest_gputrain.batch.search import SearchResult

Probe = Callable[[int], "float | None"]
Known = Mapping[int, "float | None"]
Search = Callable[[Probe, Known], "SearchResult"]


@dataclass(frozen=True)
class Measures:
    """In bytes: what may be used, of what capacity, and what is free. ``is_real``: no given capacity."""

    limit: int
    capacity: int
    free: int
    is_real: bool


@dataclass(frozen=True)
class Found:
    """The answer, what was known beside its probes, whether all of it was known, and the cache's key."""

    result: SearchResult
    known: Known
    from_cache: bool
    key: Mapping[str, Any] = field(default_factory=dict)


class _NotKnown(Exception):
    """The search asks for a size that nobody has measured."""


def search_through(
    cache: BatchCache, key: Mapping[str, Any], search: Search, probe: Probe, measures: Measures
) -> Found:
    """The answer by the cache; what had to be measured is stored."""
    if found := _looked_up(cache.load(key), search, probe, measures):
        return replace(found, key=key)
    with cache.lock(key):
        # Another process may have measured it while this one waited.
        entry = cache.load(key)
        if found := _looked_up(entry, search, probe, measures):
            return replace(found, key=key)
        known = _usable(entry, measures)
        result = search(probe, known)
        measured = Entry.measured(
            result.probes, limit=measures.limit, capacity=measures.capacity, free_bytes=measures.free
        )
        cache.store(key, entry.merged(measured) if entry else measured)
    return Found(result, known, from_cache=False, key=key)


def _looked_up(entry: Entry | None, search: Search, probe: Probe, measures: Measures) -> Found | None:
    """None where what is known is not enough, or does not hold any more."""
    if entry is None:
        return None

    def refuse(batch_size: int) -> float | None:
        raise _NotKnown

    known = entry.known(measures.limit)
    try:
        result = search(refuse, known)
    except _NotKnown:
        return None
    if not result.size:  # measured once more, so that the failure can say what memory was for
        return None
    if measures.is_real and entry.must_be_confirmed(measures.free, measures.limit):
        peak = probe(result.size)
        if peak is None or peak > measures.limit:
            return None
    return Found(result, known, from_cache=True)


def _usable(entry: Entry | None, measures: Measures) -> Known:
    """What the search may take as run: nothing where less is free than when it was measured."""
    if entry is None or (measures.is_real and entry.must_be_confirmed(measures.free, measures.limit)):
        return {}
    known = entry.known(measures.limit)
    return known if any(peak is not None for peak in known.values()) else {}


def rule_out(cache: BatchCache, found: Discovered, sizes: list[int]) -> None:
    """Store that these sizes do not fit under the limit of a discovery: another rank ran out of memory."""
    if (entry := cache.load(found.cache_key)) is not None:
        ran_out = dict.fromkeys(sizes, found.limit)
        cache.store(found.cache_key, entry.merged(replace(entry, peaks={}, ran_out=ran_out)))
