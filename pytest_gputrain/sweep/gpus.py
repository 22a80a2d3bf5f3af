"""The GPUs that branches run on: each holds its own, so several run at once where there are more."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from pytest_gputrain.devices import Gpu, discover, visible_gpus
from pytest_gputrain.devices.lease_folder import LeaseFolder, default_path
from pytest_gputrain.devices.visible import VARIABLE
from pytest_gputrain.launch import LaunchCancelled

LEASE_TIMEOUT = 3600.0


@dataclass(frozen=True)
class Gpus:
    """``num_ranks`` GPUs a branch, leased from those that this process sees."""

    num_ranks: int
    lease_dir: Path | None = None
    lease_timeout: float = LEASE_TIMEOUT

    @property
    def at_once(self) -> int:
        """How many branches have room side by side; 0 where not even one has."""
        return len(visible_gpus(discover(), os.environ)) // self.num_ranks

    def prepare(self) -> None:
        """Raises LeaseFolderError, before anything starts."""
        self._folder().prepare()

    @contextlib.contextmanager
    def held(self, who: str, cancelled: Callable[[], bool]) -> Iterator[tuple[Gpu, ...]]:
        """Hold GPUs for the time of the block. Raises LeaseTimeout, GpusOccupied, LaunchCancelled."""
        from pytest_gputrain.devices.lease_place import Request
        from pytest_gputrain.devices.leases import acquire

        def on_wait(_seconds: float) -> None:
            if cancelled():
                raise LaunchCancelled

        request = Request(self.num_ranks, visible_gpus(discover(), os.environ), who)
        lease = acquire(self._folder(), request, deadline=self.lease_timeout, on_wait=on_wait)
        try:
            yield lease.gpus
        finally:
            lease.release()

    def _folder(self) -> LeaseFolder:
        return LeaseFolder(self.lease_dir or default_path())


HIDDEN = {VARIABLE: ""}
"""Environment of a branch on the CPU: it must not take a GPU that nobody has leased for it."""
