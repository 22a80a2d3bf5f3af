"""One request's place in the queue of a lease folder. Everything here is done under the lock of the queue."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import psutil

from pytest_gputrain.devices import lease_queue
from pytest_gputrain.devices.lease_folder import LeaseFolder, LeaseFolderError, gpu_name
from pytest_gputrain.devices.lease_queue import Ticket

if TYPE_CHECKING:
    from filelock import BaseFileLock

    from pytest_gputrain.devices.inventory import Gpu

# Who waits looks several times a second. One that has not for so long is stopped (Ctrl-Z, a debugger), and
# the others do not wait for it.
ASLEEP = 20.0
MOST_NUMBER = 2**63
"""Nanoseconds since the epoch stay below it for two centuries."""


class Request(NamedTuple):
    """What somebody wants: ``num_gpus`` of ``candidates``. ``who`` is for people, such as a test's id.

    ``seconds`` is how long it will hold them, where an earlier run has shown it.
    """

    num_gpus: int
    candidates: tuple[Gpu, ...]
    who: str
    seconds: float | None = None


class Place:
    """Drawn when the request cannot be served at once, and given up in any case."""

    def __init__(self, folder: LeaseFolder, request: Request) -> None:
        self._folder, self.request = folder, request
        self._number = time.time_ns()
        self._name = f"wait-{self._number:020d}-{os.getpid()}"
        self._lock: BaseFileLock | None = None
        self._written: tuple[str, ...] = ()
        self.num_before = 0
        """How many went before this request when it last looked."""

    def try_take(self) -> dict[str, BaseFileLock] | None:
        """The locks of this request's GPUs by UUID: all of them, or None and a place in the queue."""
        folder, now = self._folder, time.time()
        with folder.queue():
            mine, others = self._ticket(now), self._others(now)
            wanted = dict.fromkeys(gpu for ticket in [mine, *others] for gpu in ticket.candidates)
            free: dict[str, BaseFileLock] = {}
            try:
                for uuid in wanted:
                    if (lock := folder.try_lock(f"{gpu_name(uuid)}.lock")) is not None:
                        free[uuid] = lock
                back_in = self._back_in([uuid for uuid in wanted if uuid not in free], now)
                given = lease_queue.grants([mine, *others], free, back_in)
                self.num_before = lease_queue.in_order([mine, *others]).index(mine)
                taken = {uuid: free.pop(uuid) for uuid in given.get(mine.number, ())}
            finally:
                for lock in free.values():
                    lock.release()
            if taken:
                self._sign(taken, now)
                return taken
            self._draw(mine)
            return None

    def _ticket(self, now: float) -> Ticket:
        candidates = tuple(gpu.uuid for gpu in self.request.candidates)
        waited = now - self._number / 1e9
        return Ticket(self._number, self.request.num_gpus, candidates, waited, self.request.seconds)

    def _others(self, now: float) -> list[Ticket]:
        """The tickets of the others that still wait. Those of the dead are removed, as far as we may."""
        found = []
        for name in self._folder.names("wait"):
            if name == self._name:
                continue
            if (lock := self._folder.try_lock(f"{name}.lock")) is not None:
                self._folder.remove(name)
                lock.release()
            elif self._folder.age(name) < ASLEEP:
                found.append(read_ticket(self._folder.read(name), now))
        return [ticket for ticket in found if ticket is not None]

    def _back_in(self, held: list[str], now: float) -> dict[str, float]:
        """Seconds until a held GPU is expected back, by the records of its holders."""
        found = {}
        for uuid in held:
            record = self._folder.read(gpu_name(uuid))
            since, seconds = as_seconds(record.get("since")), as_seconds(record.get("seconds"))
            if since is not None and seconds is not None:
                found[uuid] = max(0.0, since + seconds - now)
        return found

    def _draw(self, ticket: Ticket) -> None:
        """Take a place that others see, or show that its owner still waits."""
        if self._lock is None:
            self._lock = self._folder.try_lock(f"{self._name}.lock")
            assert self._lock is not None, "the name is this request's own"
        if self._written == ticket.candidates:
            self._folder.touch(self._name)
            return
        record = {**ticket._asdict(), "who": self.request.who, "pid": os.getpid()}
        del record["waited"]  # follows from the number, which is the time of arrival
        self._folder.write(self._name, record)
        self._written = ticket.candidates

    def _sign(self, taken: Mapping[str, BaseFileLock], now: float) -> None:
        """Say who holds the GPUs. Only for people and for guesses: a full disk takes no lease away."""
        record = {
            "pid": os.getpid(),
            "process_started": psutil.Process().create_time(),
            "who": self.request.who,
            "since": now,
            "num_gpus": self.request.num_gpus,
            "seconds": self.request.seconds,
        }
        for uuid in taken:
            with contextlib.suppress(LeaseFolderError):
                self._folder.write(gpu_name(uuid), {"uuid": uuid, **record})

    def give_up(self) -> None:
        """Leave the queue, served or not."""
        lock, self._lock = self._lock, None
        if lock is not None:
            self._written = ()
            self._folder.remove(self._name)
            lock.release()


def read_ticket(record: Mapping[str, Any], now: float) -> Ticket | None:
    """Return the ticket that a record describes, or None when it is none."""
    number, num_gpus, candidates = (record.get(name) for name in ("number", "num_gpus", "candidates"))
    if not isinstance(number, int) or not isinstance(num_gpus, int) or not isinstance(candidates, list):
        return None
    if not 0 < number < MOST_NUMBER or num_gpus < 1 or not all(isinstance(one, str) for one in candidates):
        return None
    waited = now - number / 1e9
    return Ticket(number, num_gpus, tuple(candidates), waited, as_seconds(record.get("seconds")))


def as_seconds(value: object) -> float | None:
    """What can be believed of a number that anything may have written; JSON knows NaN and any size."""
    if isinstance(value, (int, float)) and -MOST_NUMBER < value < MOST_NUMBER:
        return float(value)
    return None
