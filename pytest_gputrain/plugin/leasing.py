"""A test marked ``requires_gpus`` holds its GPUs while it runs: from before its setup to after its teardown.

The wait is over before pytest-timeout's clock starts, whatever its method. Where no GPU can be had in time
the test fails in setup, with who holds them: neither green nor skipped, since the hardware is there.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

import pytest

from pytest_gputrain.devices import Gpu, discover, gpus_to_share, visible_gpus
from pytest_gputrain.devices.lease_folder import LeaseFolder, LeaseFolderError, default_path
from pytest_gputrain.devices.shortage import count
from pytest_gputrain.plugin import lease_order, markers, properties
from pytest_gputrain.plugin.settings import settings_of
from pytest_gputrain.plugin.xdist import refusals
from pytest_gputrain.values import parse_size

if TYPE_CHECKING:
    from pytest_gputrain.devices.leases import Lease

# Turns of a second are nothing to talk about; then somebody may wonder what the session is doing.
REPORT_AFTER = 5.0
REPORT_EVERY = 60.0

_HELD = pytest.StashKey["HeldGpus"]()
_REFUSED = pytest.StashKey[str]()


class HeldGpus(tuple[Gpu, ...]):
    """The GPUs that a test holds.

    Ranks of ``ddp_launcher`` see these alone. In the pytest process itself, which sees all GPUs for the whole
    session, they are ``devices``.
    """

    __slots__ = ()

    @property
    def devices(self) -> list[str]:
        """``["cuda:2", "cuda:3"]``: what they are called in this process, in the order of the GPUs."""
        order = visible_gpus(discover(), os.environ)
        return [f"cuda:{order.index(gpu)}" for gpu in self]


def folder_of(config: pytest.Config) -> LeaseFolder:
    """Return the folder through which this session leases."""
    return LeaseFolder(settings_of(config).lease_dir or default_path())


class LeaseSession:
    """What happens to the tests of a session once all others have had their say about which of them run."""

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[pytest.Item]) -> None:
        with refusals(config, items):
            markers.prepare(items)  # what others, such as a conftest, have added
            plans = {item: plan(item) for item in items}
            if any(plans.values()):
                _prepare_folder(config)
            lease_order.order(config, items, {item: p.num_gpus if p else 0 for item, p in plans.items()})


def _prepare_folder(config: pytest.Config) -> None:
    """Make the folder through which tests will lease. Raises ``pytest.UsageError`` when it cannot be used."""
    if config.getoption("collectonly"):
        return
    try:
        folder_of(config).prepare()
    except LeaseFolderError as error:
        raise pytest.UsageError(str(error)) from None


class Plan(NamedTuple):
    """How many of which GPUs a test is going to hold."""

    num_gpus: int
    candidates: tuple[Gpu, ...]


def plan(item: pytest.Item) -> Plan | None:
    """Return what the test leases; None where it needs no GPU, or more than there are.

    With ``--share-gpu`` ranks may outnumber the GPUs: the test then holds all those that they share.
    """
    mark = item.get_closest_marker("requires_gpus")
    if mark is None:
        return None
    needed = markers.gpu_need(mark)
    least = 0 if needed.memory is None else parse_size(needed.memory)
    found = tuple(gpu for gpu in visible_gpus(discover(), os.environ) if gpu.memory_bytes >= least)
    if len(found) >= needed.num_gpus:
        return Plan(needed.num_gpus, found)
    if settings_of(item.config).share_gpu and (shared := gpus_to_share(needed.num_gpus, needed.memory)):
        return Plan(len(shared), shared)
    return None


def held(item: pytest.Item) -> HeldGpus:
    """Return the GPUs that the test holds at this moment."""
    return item.stash.get(_HELD, HeldGpus())


def refused(item: pytest.Item) -> str | None:
    """Return why the test, which is about to be set up, did not get its GPUs."""
    return item.stash.get(_REFUSED, None)


@contextlib.contextmanager
def leased(item: pytest.Item) -> Iterator[None]:
    """Hold the test's GPUs for the time of the block. What goes wrong is for the test's setup to raise."""
    if _REFUSED in item.stash:  # an earlier run of the same test
        del item.stash[_REFUSED]
    planned = _planned(item)
    lease = _acquire(item, planned) if planned is not None else None
    if lease is not None:
        item.stash[_HELD] = HeldGpus(lease.gpus)
    try:
        yield
    finally:
        if lease is not None:
            try:
                _free_cached_memory()
                _end_warm_ranks()
            finally:
                lease.release()
                del item.stash[_HELD]


def _planned(item: pytest.Item) -> Plan | None:
    """What the test is to hold, if it is going to run."""
    try:
        markers.prepare([item])  # once more: hooks that came after ours may have added some
        return None if _is_skipped(item) or markers.skip_reason(item) else plan(item)
    except pytest.UsageError as error:
        item.stash[_REFUSED] = str(error)
        return None


def _is_skipped(item: pytest.Item) -> bool:
    """Whether it is plain that the test will not run. Conditions written as text are pytest's to evaluate."""
    if item.get_closest_marker("skip"):
        return True
    conditions = (condition for mark in item.iter_markers("skipif") for condition in mark.args)
    return any(_is_true(condition) for condition in conditions if not isinstance(condition, str))


def _is_true(condition: object) -> bool:
    try:
        return bool(condition)
    except Exception:  # pytest's to tell, in the test's setup
        return False


def _acquire(item: pytest.Item, planned: Plan) -> Lease | None:
    from pytest_gputrain.devices.lease_place import Request
    from pytest_gputrain.devices.leases import GpusOccupied, LeaseTimeout, acquire

    worker: str = getattr(item.config, "workerinput", {}).get("workerid", "")
    who = item.nodeid + (f" ({worker})" if worker else "")
    request = Request(*planned, who, lease_order.expected(item))
    folder, deadline = folder_of(item.config), settings_of(item.config).lease_timeout
    try:
        narrate = _Narrator(item, folder, planned.num_gpus)
        lease = acquire(folder, request, deadline=deadline, on_wait=narrate)
    except (GpusOccupied, LeaseTimeout, LeaseFolderError, OSError) as error:
        item.stash[_REFUSED] = str(error)
        return None
    _note(item, lease, worker)
    return lease


def _note(item: pytest.Item, lease: Lease, worker: str) -> None:
    """Tell the reports of this test what it holds, and how long it waited if that was worth a word."""
    record = {
        "gpus": [[gpu.index, gpu.uuid] for gpu in lease.gpus],
        "since": lease.since,
        "waited": round(lease.waited, 4),
        "worker": worker or "main",
        "pid": os.getpid(),
    }
    properties.add(item, properties.LEASE, json.dumps(record))
    if lease.waited >= REPORT_AFTER:
        text = f"waited {lease.waited:.1f} s for {count(len(lease.gpus))}; no timeout of the test counts that"
        item.add_report_section("setup", "gputrain lease", text)


def _free_cached_memory() -> None:
    """What a test left in torch's cache in this process would keep the GPU from whoever holds it next."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        gc.collect()
        # A context that a kernel has poisoned frees nothing any more; the lease goes back all the same.
        with contextlib.suppress(Exception):
            torch.cuda.empty_cache()


def _end_warm_ranks() -> None:
    """Kept ranks hold contexts on the GPUs that are about to be somebody else's."""
    warm = sys.modules.get("pytest_gputrain.launch.warm")
    if warm is not None:
        warm.POOL.close("cuda")


class _Narrator:
    """Says on the terminal, now and then, what a test waits for and who holds it."""

    def __init__(self, item: pytest.Item, folder: LeaseFolder, num_gpus: int) -> None:
        self._item, self._folder, self._num_gpus = item, folder, num_gpus
        self._next = REPORT_AFTER

    def __call__(self, waited: float) -> None:
        if waited < self._next:
            return
        self._next = waited + REPORT_EVERY
        from pytest_gputrain.devices.leases import holders

        held = "; ".join(map(str, holders(self._folder))) or "nobody at this moment"
        wait = f"{self._item.nodeid} has waited {waited:.0f} s for {count(self._num_gpus)}"
        say(self._item.config, f"gputrain: {wait}; held: {held}")


def say(config: pytest.Config, line: str) -> None:
    """Write a line for people between two tests."""
    reporter = config.pluginmanager.get_plugin("terminalreporter")
    if reporter is None or hasattr(config, "workerinput"):
        # A worker's standard output goes nowhere; its standard error is that of the session.
        print(line, file=sys.__stderr__, flush=True)
        return
    reporter.ensure_newline()
    reporter.write_line(line)
