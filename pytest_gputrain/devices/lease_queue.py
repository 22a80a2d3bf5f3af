"""Who of the waiting may take which GPUs now. Pure: from the same folder all come to the same answer.

Three rules, and why these:

* Largest first, and of equals the longest: what is left at the end of a session is then small and fills gaps.
* Who cannot start keeps the free GPUs that it could use: a large request would otherwise never see all its
  GPUs free at once while small ones come and go. This is what idles GPUs, so it happens as seldom as can be:
  large requests come one after the other by the first rule, and a request that is known (from an earlier run)
  to be done before the large one could start anyway may go in between.
* Who has waited for ``PATIENCE`` goes by arrival, before all younger ones, and nobody goes in between any
  more. So everybody waits for a bounded number of others, small requests among endless large ones too.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import NamedTuple

# Long against the tests that take turns in a second, short against a session.
PATIENCE = 30.0


class Ticket(NamedTuple):
    """A request that waits: ``num_gpus`` of ``candidates`` (UUIDs), since ``waited`` seconds.

    ``seconds`` is how long it held its GPUs the last time, None when nobody knows. A lower ``number`` has
    come earlier.
    """

    number: int
    num_gpus: int
    candidates: tuple[str, ...]
    waited: float = 0.0
    seconds: float | None = None

    @property
    def impatient(self) -> bool:
        return self.waited >= PATIENCE


def in_order(waiting: Iterable[Ticket]) -> list[Ticket]:
    """Return the tickets, first who is served first."""
    return sorted(waiting, key=_rank)


def _rank(ticket: Ticket) -> tuple[bool, float, float, int]:
    if ticket.impatient:
        return (False, 0, 0, ticket.number)
    return (True, -ticket.num_gpus, -(ticket.seconds or 0.0), ticket.number)


def grants(
    waiting: Collection[Ticket], free: Collection[str], remaining: Mapping[str, float] | None = None
) -> dict[int, tuple[str, ...]]:
    """Return, by ticket number, the GPUs of each request that may start now: all it asks for.

    remaining: seconds until a held GPU is expected back, where that is known.
    """
    back_in = dict(remaining or {})
    unclaimed = set(free)
    kept: dict[str, float] = {}  # kept for a request that needs more: the seconds until it could start
    given: dict[int, tuple[str, ...]] = {}
    for ticket in in_order(waiting):
        usable = [
            gpu for gpu in ticket.candidates if gpu in unclaimed or _back_in_time(ticket, kept.get(gpu))
        ]
        if len(usable) >= ticket.num_gpus:
            chosen = _least_wanted(ticket, usable, waiting, kept)
            given[ticket.number] = chosen
            for gpu in chosen:
                kept.pop(gpu, None)
                if ticket.seconds is not None:
                    back_in[gpu] = ticket.seconds
            unclaimed.difference_update(chosen)
            continue
        start = 0.0 if ticket.impatient else _could_start_in(ticket, len(usable), back_in)
        for gpu in usable:
            kept[gpu] = min(start, kept.get(gpu, start))
        unclaimed.difference_update(usable)
    return given


def _back_in_time(ticket: Ticket, start: float | None) -> bool:
    return start is not None and ticket.seconds is not None and ticket.seconds <= start


def _could_start_in(ticket: Ticket, num_usable: int, back_in: Mapping[str, float]) -> float:
    """Seconds until enough GPUs are expected back; 0 when that is not known of enough of them."""
    known = sorted(back_in[gpu] for gpu in ticket.candidates if gpu in back_in)
    lacking = ticket.num_gpus - num_usable
    return known[lacking - 1] if len(known) >= lacking else 0.0


def _least_wanted(
    ticket: Ticket, usable: list[str], waiting: Collection[Ticket], kept: Mapping[str, float]
) -> tuple[str, ...]:
    """The GPUs that the fewest others could use: the large GPU is left to who needs it."""
    wanted = {gpu: sum(gpu in other.candidates for other in waiting) for gpu in usable}
    by_need = sorted(usable, key=lambda gpu: (gpu in kept, wanted[gpu]))
    chosen = set(by_need[: ticket.num_gpus])
    return tuple(gpu for gpu in ticket.candidates if gpu in chosen)
