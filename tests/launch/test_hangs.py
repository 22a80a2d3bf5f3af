"""Every planted hang, crash and desync is named: verdict, culprit, operation, lines. No healthy one is."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import pytest

from pytest_gputrain import launch
from pytest_gputrain.launch import Verdict
from tests.planted.hangs import EITHER, Hang
from tests.planted.hangs_absent import ABSENT
from tests.planted.hangs_desync import DESYNC
from tests.planted.healthy_waits import WAITS


def params(hangs: Iterable[Hang]) -> list[object]:
    slow = pytest.mark.slow
    return [pytest.param(hang, id=hang.name, marks=[slow] if hang.slow else []) for hang in hangs]


@pytest.mark.parametrize("hang", params([*ABSENT, *DESYNC]))
def test_a_planted_hang_is_named(hang: Hang) -> None:
    result = launch(
        hang.program, world_size=hang.world_size, timeout=hang.timeout, stall=hang.stall, check=False
    )
    text = result.summary()
    assert result.verdict.name == hang.verdict, text
    assert result.cause is not None, text
    assert result.cause.rank == hang.blames or hang.blames == EITHER, text
    for words in hang.says:
        assert words in text, text
    if culprit := hang.marked("culprit"):
        assert any(line in str(result.cause) for line in culprit), text
    for line in hang.marked("victim"):
        assert line in text, text
    if hang.verdict == "HUNG":
        assert result.seconds < hang.timeout / 2, text


@pytest.mark.parametrize("program", [pytest.param(program, id=program.__name__) for program in WAITS])
def test_a_healthy_wait_is_left_alone(program: Callable[[], Any]) -> None:
    size = 3 if "subgroup" in program.__name__ else 2
    result = launch(program, world_size=size, timeout=100, stall=60, check=False)
    assert result.verdict is Verdict.PASSED, result.summary()
    assert list(result.artifacts.rglob("calls.ring")) == []
