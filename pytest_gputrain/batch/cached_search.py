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


# How much less than at the measurement may be free before an answer is run again. Free memory is never twice
# the same: on a host, caches, other processes' comings and goings and this one's own imports move it by some
# per cent; on a GPU, the kernels and handles that libraries load on first use take some hundred MB. Both are
# less than the usual safety margin leaves.
HOST_SLACK = 0.05
GPU_SLACK = 0.01


@dataclass(frozen=True)
class Measures:
    """In bytes: what may be used, of what capacity, and what is free.

    ``accounted``: on a CPU with a given capacity. Then tensors are counted, whatever the host has free.
    """

    limit: int
    capacity: int
    free: int
    on_gpu: bool
    accounted: bool

    @property
    def slack(self) -> float | None:
        """As ``Entry.must_be_confirmed`` takes it."""
        if self.accounted:
            return None
        return GPU_SLACK if self.on_gpu else HOST_SLACK

    @property
    def within(self) -> int:
        """What a probe that ran out could have had: the limit, or what was free where that is less."""
        return self.limit if self.accounted else min(self.limit, self.free)


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
    attempt = _Attempt(search, probe, measures)
    if found := attempt.looked_up(cache.load(key)):
        return replace(found, key=key)
    with cache.lock(key):
        # Another process may have measured it while this one waited.
        entry = cache.load(key)
        if found := attempt.looked_up(entry):
            return replace(found, key=key)
        found = attempt.searched(entry)
        probes = [*attempt.refuting.items(), *found.result.probes]
        measured = Entry.measured(
            probes, limit=measures.within, capacity=measures.capacity, free_bytes=measures.free
        )
        # Where one answer of an entry did not hold, the rest of it does not count either.
        cache.store(key, entry.merged(measured) if entry and not attempt.refuting else measured)
    return replace(found, key=key)


class _Attempt:
    """``refuting``: empty, or what was run now and showed that an entry does not hold any more."""

    def __init__(self, search: Search, probe: Probe, measures: Measures) -> None:
        self._search, self._probe, self._measures = search, probe, measures
        self._refuted: Entry | None = None
        self.refuting: dict[int, float | None] = {}

    def looked_up(self, entry: Entry | None) -> Found | None:
        """The answer of an entry, None where what it knows is not enough or does not hold any more."""
        if entry is None or entry == self._refuted:
            return None
        known = entry.known(self._measures.within)
        try:
            result = self._search(_unknown, known)
        except _NotKnown:
            return None
        # Where nothing fits it is measured once more, so that the failure can say what memory was for.
        if not result.size or not self._holds(result, entry):
            return None
        return Found(result, known, from_cache=True)

    def searched(self, entry: Entry | None) -> Found:
        """The answer by running what the entry does not know, or all where it does not hold any more."""
        known: Known = self.refuting
        if entry is not None and entry != self._refuted:
            known = {**_usable(entry.known(self._measures.within)), **self.refuting}
            result = self._search(self._probe, known)
            if self._holds(result, entry):
                return Found(result, known, from_cache=False)
            known = self.refuting
        return Found(self._search(self._probe, known), known, from_cache=False)

    def _holds(self, result: SearchResult, entry: Entry) -> bool:
        """Whether the answer does; it is run if it was not, and less is free than when it was measured."""
        measures, probes = self._measures, dict(result.probes)
        if not result.size or result.size in probes:
            return True
        if not entry.must_be_confirmed(measures.free, measures.limit, measures.slack):
            return True
        peak = self._probe(result.size)
        if peak is not None and peak <= measures.limit:
            return True
        self._refuted, self.refuting = entry, {**self.refuting, **probes, result.size: peak}
        return False


def _unknown(batch_size: int) -> float | None:
    raise _NotKnown


def _usable(known: Known) -> Known:
    """Nothing where nothing fitted: run once more, so that the failure can say what memory was for."""
    return known if any(peak is not None for peak in known.values()) else {}


def rule_out(cache: BatchCache, found: Discovered, sizes: list[int]) -> None:
    """Store that these sizes do not fit under the limit of a discovery: another rank ran out of memory."""
    if (entry := cache.load(found.cache_key)) is not None:
        ran_out = dict.fromkeys(sizes, found.limit)
        cache.store(found.cache_key, entry.merged(replace(entry, peaks={}, ran_out=ran_out)))
