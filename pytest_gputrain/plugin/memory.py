"""The fixture ``oom_guard``: guards whose figures go into the test's report, as a section and a property."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from pytest_gputrain.plugin import properties

if TYPE_CHECKING:
    import torch

    from pytest_gputrain.memory.guard import OomGuard

_GUARDS = pytest.StashKey["list[OomGuard]"]()


class GuardMaker:
    """``oom_guard(limit=None, device=None, *, roots=())`` of one test: makes an ``OomGuard``."""

    def __init__(self, item: pytest.Item) -> None:
        self._guards = item.stash.setdefault(_GUARDS, [])

    def __call__(
        self,
        limit: int | str | None = None,
        device: str | torch.device | None = None,
        *,
        roots: Any = (),
    ) -> OomGuard:
        __tracebackhide__ = True
        from pytest_gputrain.memory.guard import OomGuard

        guard = OomGuard(limit, device, roots=roots)
        self._guards.append(guard)
        return guard


def complete(item: pytest.Item, call: pytest.CallInfo[None]) -> None:
    """Add to the report of this phase what each guard measured in it."""
    for guard in (guards := item.stash.get(_GUARDS, [])):
        if told := guard.figures():
            item.add_report_section(call.when, "oom_guard", told + "\n")
            properties.add(item, properties.PEAK_MEMORY, told.splitlines()[0])
    guards.clear()
