"""Drawing on from a stream, on all ranks alike.

A stream may communicate as it is drawn from (rank 0 reads and scatters), so that every rank has to ask it
as often as the others: no rank may stop by its own clock.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

from pytest_gputrain.checks.peers import Peers

# Doubled from round to round: a slow stream overruns its seconds by about as long as it took until then.
FIRST_ROUND, LARGEST_ROUND = 4, 256
_END = object()


class Rounds:
    """Batches in rounds of an agreed number; after each, the ranks vote whether to draw on.

    A collective: all ranks make one, and iterate it to its end. Stops at the round in which a stream ended,
    ``limit`` batches are drawn, or a rank has taken ``seconds``. ended: whether this rank's stream is used
    up; true from the start where it was before.
    """

    def __init__(self, data: Iterator[Any], peers: Peers, *, limit: int, seconds: float, ended: bool) -> None:
        self._data, self._peers, self._limit = data, peers, limit
        self._deadline = time.monotonic() + seconds
        self.ended = ended

    def __iter__(self) -> Iterator[Any]:
        drawn, size = 0, FIRST_ROUND
        while drawn < self._limit:
            if self._peers.any_rank(self.ended or time.monotonic() > self._deadline):
                return
            for _ in range(size):
                if (batch := next(self._data, _END)) is _END:
                    self.ended = True
                    break
                yield batch
            drawn, size = drawn + size, min(2 * size, LARGEST_ROUND)
