"""Leases: a process's exclusive hold on n GPUs, across xdist workers and across independent runs on a host.

All or nothing: the GPUs of a request are taken together, under the lock of the queue, so that two processes
never hold a part each and wait for the other's. Who holds what is a lock a GPU that the kernel drops with its
process. Forked children do not inherit it (filelock closes it in them), nor do started programs
(close-on-exec).
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

from pytest_gputrain.devices.lease_folder import LeaseFolder
from pytest_gputrain.devices.lease_place import Place, Request
from pytest_gputrain.devices.occupancy import in_use
from pytest_gputrain.devices.shortage import count

if TYPE_CHECKING:
    from filelock import BaseFileLock

    from pytest_gputrain.devices.inventory import Gpu

# The bell is looked at this often: it is one small file. A death rings no bell, so look at the locks as well.
BELL_POLL = 0.01
LOOK_AGAIN = 0.4
# Looking takes about 3 ms, one after the other: who is first in the queue shall not wait for all the others.
STAGGER = 0.003
# A GPU whose memory is in use is looked at again after so long; the driver takes about a second to give back
# the memory of a process that was killed. Who finds too few free ones for OCCUPIED_DEADLINE gives up.
AVOID = 1.0
OCCUPIED_DEADLINE = 60.0


class Holder(NamedTuple):
    """Who holds a GPU. ``pid`` is 0 and ``who`` says so where the record cannot be read."""

    uuid: str
    pid: int
    who: str
    since: float
    num_gpus: int = 1

    def __str__(self) -> str:
        if not self.pid:
            return f"{self.uuid}: {self.who}"
        return f"{self.uuid}: {self.who}, pid {self.pid}, for {max(0.0, time.time() - self.since):.0f} s"


class LeaseTimeout(Exception):
    """No lease within the deadline. ``holders`` are those of the GPUs that the request could have used."""

    def __init__(self, num_gpus: int, waited: float, holders: Sequence[Holder]) -> None:
        super().__init__(num_gpus, waited, holders)
        self.num_gpus, self.waited, self.holders = num_gpus, waited, holders

    def __str__(self) -> str:
        held = "; ".join(map(str, self.holders)) or "none is held at this moment, others are before this one"
        return f"waited {self.waited:.0f} s for {count(self.num_gpus)}, held by others: {held}"


class GpusOccupied(Exception):
    """GPUs that nobody leases are in use all the same. ``users`` has one line a GPU."""

    def __init__(self, num_gpus: int, users: Sequence[str]) -> None:
        super().__init__(num_gpus, users)
        self.num_gpus, self.users = num_gpus, users

    def __str__(self) -> str:
        return f"needs {count(self.num_gpus)} with free memory: {'; '.join(self.users)}"


@dataclass
class Lease:
    """GPUs that are this process's until ``release``. ``since`` is in seconds since the epoch."""

    gpus: tuple[Gpu, ...]
    since: float
    waited: float
    _folder: LeaseFolder = field(repr=False)
    _locks: list[BaseFileLock] = field(repr=False)

    def release(self) -> None:
        """Give the GPUs back. A second call does nothing."""
        locks, self._locks = self._locks, []
        for lock in locks:
            with contextlib.suppress(OSError):
                lock.release()
        if locks:
            self._folder.ring()


def acquire(
    folder: LeaseFolder,
    request: Request,
    *,
    deadline: float,
    on_wait: Callable[[float], None] | None = None,
) -> Lease:
    """Wait for the GPUs and return the lease. ``deadline`` in seconds from now.

    ``on_wait`` is called with the seconds waited so far, several times a second. Raises ``LeaseTimeout``,
    ``GpusOccupied``, and ``LeaseFolderError`` when the folder cannot be used.
    """
    began = time.monotonic()
    place, avoided = Place(folder, request), _Avoided()
    try:
        while True:
            bell, waited = folder.bell(), time.monotonic() - began
            place.request = request._replace(candidates=avoided.others(request.candidates))
            if len(place.request.candidates) < request.num_gpus:
                place.give_up()  # nothing is kept for a request that cannot start yet
                avoided.raise_after(OCCUPIED_DEADLINE if waited < deadline else 0.0, request.num_gpus)
            elif (locks := place.try_take()) is not None:
                if (lease := _checked(folder, request, locks, waited, avoided)) is not None:
                    return lease
                continue
            if waited >= deadline:
                raise LeaseTimeout(request.num_gpus, waited, _holders_of(folder, request))
            if on_wait is not None:
                on_wait(waited)
            _wait_for_bell(folder, bell, min(LOOK_AGAIN, deadline - waited))
            time.sleep(STAGGER * min(place.num_before, 16))
    finally:
        place.give_up()


def _checked(
    folder: LeaseFolder, request: Request, locks: Mapping[str, BaseFileLock], waited: float, avoided: _Avoided
) -> Lease | None:
    """The lease if the memory of its GPUs is free; else None, and nothing is held."""
    gpus = tuple(gpu for gpu in request.candidates if gpu.uuid in locks)
    lease = Lease(gpus, time.time(), waited, folder, [*locks.values()])
    try:
        if not avoided.add(gpus):
            return lease
    except BaseException:  # KeyboardInterrupt while the driver answers
        lease.release()
        raise
    lease.release()
    return None


def _wait_for_bell(folder: LeaseFolder, bell: bytes, seconds: float) -> None:
    limit = time.monotonic() + seconds
    while folder.bell() == bell and (left := limit - time.monotonic()) > 0:
        time.sleep(min(BELL_POLL, left))


class _Avoided:
    """GPUs that were found in use although nobody leases them, each until it is looked at again."""

    def __init__(self) -> None:
        self._until: dict[str, float] = {}
        self._users: dict[str, str] = {}
        self._since: float | None = None

    def add(self, gpus: Sequence[Gpu]) -> bool:
        """Whether one of these GPUs is in use; those that are will be avoided for a while."""
        found = in_use(gpus)
        now = time.monotonic()
        self._until.update(dict.fromkeys(found, now + AVOID))
        self._users.update(found)
        return bool(found)

    def others(self, gpus: tuple[Gpu, ...]) -> tuple[Gpu, ...]:
        now = time.monotonic()
        return tuple(gpu for gpu in gpus if self._until.get(gpu.uuid, 0.0) <= now)

    def raise_after(self, seconds: float, num_gpus: int) -> None:
        """Raise ``GpusOccupied`` when there have been too few free ones for so long."""
        now = time.monotonic()
        self._since = now if self._since is None else self._since
        if now - self._since >= seconds:
            raise GpusOccupied(num_gpus, [self._users[uuid] for uuid in sorted(self._users)])


def _holders_of(folder: LeaseFolder, request: Request) -> list[Holder]:
    could_use = {gpu.uuid for gpu in request.candidates}
    return [holder for holder in holders(folder) if holder.uuid in could_use]


def holders(folder: LeaseFolder) -> list[Holder]:
    """Return who holds which GPU now, in order of UUID. Raises ``LeaseFolderError``."""
    found = []
    with folder.queue():
        for name in folder.names("gpu"):
            if (lock := folder.try_lock(f"{name}.lock")) is not None:
                lock.release()
            else:
                found.append(_holder(name.removeprefix("gpu-"), folder.read(name)))
    return found


def _holder(uuid: str, record: Mapping[str, Any]) -> Holder:
    try:
        return Holder(
            str(record.get("uuid", uuid)),
            int(record["pid"]),
            str(record["who"]),
            float(record["since"]),
            int(record["num_gpus"]),
        )
    except (KeyError, TypeError, ValueError, OverflowError):
        return Holder(uuid, 0, "held, its record cannot be read", 0.0)
