"""The fixture ``compile_monitor``: monitors whose summaries go into the test's report, here and on ranks."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import pytest

from pytest_gputrain.plugin import properties

if TYPE_CHECKING:
    from pytest_gputrain.compile.monitor import CompileMonitor

_MONITORS = pytest.StashKey["list[CompileMonitor]"]()


class MonitorMaker:
    """``compile_monitor()`` of one test. A rank that it travels to gets the function of that name."""

    def __init__(self, item: pytest.Item) -> None:
        self._monitors = item.stash.setdefault(_MONITORS, [])

    def __call__(self) -> CompileMonitor:
        from pytest_gputrain.compile.monitor import compile_monitor

        self._monitors.append(monitor := compile_monitor())
        return monitor

    def __reduce__(self) -> tuple[Callable[[], Any], tuple[()]]:
        return _on_a_rank, ()


def _on_a_rank() -> Callable[[], CompileMonitor]:
    from pytest_gputrain.compile.monitor import compile_monitor

    return compile_monitor


def complete(item: pytest.Item, call: pytest.CallInfo[None]) -> None:
    """Add to the report of this phase what each monitor saw in it."""
    for monitor in (monitors := item.stash.get(_MONITORS, [])):
        from pytest_gputrain.plugin.told_figures import tell_compiled

        tell_compiled(monitor.report())
        told = str(monitor)
        item.add_report_section(call.when, "compile_monitor", told + "\n")
        properties.add(item, properties.COMPILED, told.splitlines()[0])
    monitors.clear()
