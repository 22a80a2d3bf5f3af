"""``-p tests.planted.plug_broken_depth``: stability tests at twice the size that was found."""

from __future__ import annotations

from typing import Any

import pytest

from pytest_gputrain.checks import test_stability

_FOUND = test_stability.found


def twice(*arguments: Any) -> tuple[int, int]:
    size, capacity = _FOUND(*arguments)
    return 2 * size, capacity


@pytest.fixture(autouse=True)
def planted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(test_stability, "found", twice)
