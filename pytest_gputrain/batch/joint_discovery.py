"""One discovery by all ranks: the least memory of any, a search on rank 0, a confirmation on the others.

Imports no torch at the top.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from pytest_gputrain.batch import bounds
from pytest_gputrain.batch.agreement import DiscoveryFailed, Ranks
from pytest_gputrain.batch.cached_search import rule_out
from pytest_gputrain.batch.discovered import Discovered
from pytest_gputrain.batch.discovery import find_batch
from pytest_gputrain.batch.ladder import legal_sizes
from pytest_gputrain.batch.users_own import is_users_own
from pytest_gputrain.case.loading import describe

if TYPE_CHECKING:
    import torch

    from pytest_gputrain.batch.cache import BatchCache
    from pytest_gputrain.case import TrainingCase

T = TypeVar("T")
log = logging.getLogger("pytest_gputrain.batch")


@dataclass(frozen=True)
class JointDiscovery:
    """``settings``: what ``find_batch`` takes, the same on every rank, except for ``capacity``, if given."""

    ranks: Ranks
    case: TrainingCase
    model: torch.nn.Module | None
    device: torch.device | str
    settings: dict[str, Any]
    cache: BatchCache | None

    def size(self) -> int:
        """The answer, the same on every rank. Raises as ``Ranks.each`` does."""
        at_most = least_share(self.ranks.each(lambda: attempt(self._memory)))
        found = self.ranks.first(lambda: attempt(lambda: self._search(at_most)))
        size = found.size
        if self.ranks.size > 1 and found.source != "cache":
            size = self._confirmed(found, at_most)
        self._tell(size, found.source)
        return size

    def _tell(self, size: int, source: str) -> None:
        if self.ranks.rank:
            log.info("Received batch size from rank 0: %d", size)
        elif source == "cache":
            log.info("Cache hit! Using cached batch size %d", size)
        else:
            log.info("Auto-discovery found device_batch_size=%d", size)

    def _memory(self) -> tuple[str, int]:
        if "capacity" in self.settings:
            return f"given to rank {self.ranks.rank}", int(self.settings["capacity"])
        from pytest_gputrain.batch.probe_target import memory_here
        from pytest_gputrain.memory.capacity import pool_of

        return pool_of(self.device), memory_here(self.device, self.model).free

    def _search(self, at_most: int) -> Discovered:
        found = self._find(at_most, cache=self.cache, on_start=_say_start)
        if found.source != "cache" or self.ranks.size == 1:  # sizes that other ranks ruled out look odd
            for warning in found.warnings:
                log.warning("%s", warning)
        return self._some(found)

    def _confirmed(self, found: Discovered, at_most: int) -> int:
        """The largest size that was run on every rank: each runs what the others have found."""
        asked, mine = found.size, found.size if self.ranks.rank == 0 else None
        while True:
            sizes = self.ranks.each(_bound(self._fitting, asked, at_most, mine))
            least = min(sizes)
            if least == asked:
                break
            log.warning(
                "batch size %d does not fit on rank %d, where %d does: all ranks take that",
                asked,
                sizes.index(least),
                least,
            )
            asked, mine = least, sizes[self.ranks.rank]
        if asked < found.size and self.ranks.rank == 0 and self.cache is not None:
            rule_out(self.cache, found, [size for size in self._legal() if asked < size <= found.size])
        return asked

    def _fitting(self, asked: int, at_most: int, mine: int | None) -> int:
        """``asked`` if it fits on this rank, else the largest below it; ``mine`` is known to fit."""
        if mine == asked:
            return asked
        return attempt(lambda: self._run_here(asked, at_most))

    def _run_here(self, asked: int, at_most: int) -> int:
        # Rank 0 keeps what it measures here as well: the next run then finds the joint answer in the cache.
        cache = self.cache if self.ranks.rank == 0 else None
        found = self._find(at_most, min_batch_size=asked, max_batch_size=asked, cache=cache)
        smaller = [size for size in self._legal() if size < asked]
        if not found.size and smaller:
            found = self._find(at_most, max_batch_size=smaller[-1])
        return self._some(found).size

    def _find(self, at_most: int, **changed: Any) -> Discovered:
        settings = {**self.settings, **changed}
        return find_batch(self.case, device=self.device, model=self.model, at_most=at_most, **settings)

    def _some(self, found: Discovered) -> Discovered:
        if not found.size:
            from pytest_gputrain.memory.errors import OutOfMemory

            raise OutOfMemory(
                found.too_large(self.case.name),
                limit=found.limit,
                device=str(self.device),
                by_category=found.by_category,
            )
        return found

    def _legal(self) -> list[int]:
        given = self.settings
        share = bounds.per_rank(given["global_batch_size"], given["world_size"])
        return list(legal_sizes(given["min_batch_size"], given["max_batch_size"], divides=share))


def least_share(memory: Sequence[tuple[str, int]]) -> int:
    """Bytes that every rank can have, of each rank's (pool, free bytes): ranks with one pool divide it.

    Each sees all of it as free, and all train at once: on one host's CPUs, or on a GPU that they share.
    """
    num_ranks = Counter(pool for pool, _ in memory)
    return min(free // num_ranks[pool] for pool, free in memory)


def attempt(work: Callable[[], T]) -> T:
    """``work()``. Raises ``DiscoveryFailed`` for what is neither the user's nor about memory that ran out."""
    try:
        return work()
    except Exception as error:
        from pytest_gputrain.memory.oom import is_oom

        if is_users_own(error) or is_oom(error):
            raise
        raise DiscoveryFailed(describe(error)) from error


def _bound(work: Callable[..., T], *args: Any) -> Callable[[], T]:
    return lambda: work(*args)


def _say_start() -> None:
    log.info("Running auto-discovery on rank 0")
