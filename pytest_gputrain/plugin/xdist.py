"""What only pytest-xdist needs. Registered only when xdist is there: its hooks are unknown otherwise."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest

from pytest_gputrain.plugin import lease_order

_REFUSED = "gputrain_refused"


@contextlib.contextmanager
def refusals(config: pytest.Config, items: list[pytest.Item]) -> Iterator[None]:
    """Raise usage errors about the tests collected, or in a worker tell the controller instead.

    Raised in a worker it would be shown as a crash of that worker, with a traceback of xdist; so it runs
    nothing.
    """
    try:
        yield
    except pytest.UsageError as error:
        workeroutput: dict[str, Any] | None = getattr(config, "workeroutput", None)  # set by xdist
        if workeroutput is None:
            raise
        items.clear()
        workeroutput[_REFUSED] = str(error)


def _recording(node: Any) -> Any:
    """The session's records, where there is a report; by name, so that others do not pay for the import."""
    return node.config.pluginmanager.get_plugin("gputrain-recording")


class XdistHooks:
    """The controller's side."""

    def pytest_configure_node(self, node: Any) -> None:
        lease_order.tell_worker(node.config, node.workerinput)
        if (recording := _recording(node)) is not None:
            recording.worker_begins(node)

    def pytest_xdist_node_collection_finished(self, node: Any, ids: list[str]) -> None:
        if (recording := _recording(node)) is not None:
            recording.worker_collected(ids)

    def pytest_handlecrashitem(self, crashitem: str, report: Any, sched: object) -> None:
        if (recording := _recording(report.node)) is not None:
            recording.worker_died(report.node, crashitem)

    def pytest_testnodedown(self, node: Any, error: object) -> None:
        """Raise what a worker refused as the usage error it is, for the exit code of pytest."""
        if refused := getattr(node, "workeroutput", {}).get(_REFUSED):
            raise pytest.UsageError(refused)
