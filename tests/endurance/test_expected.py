"""One thing of a long run that a case's author expects; all others are still findings."""

from __future__ import annotations

import pytest

from pytest_gputrain.endurance.expected import EXPECTABLE, Expected
from pytest_gputrain.endurance.findings import Finding

FOUND = [
    Finding(kind, 1, None, f"{kind} it is\n  more of it")
    for kind in ("loss", "step_time", "straggler", "memory", "graph", "host_memory", "objects", "threads")
]


@pytest.mark.parametrize(
    ("name", "covers"),
    [
        ("loss", ["loss"]),
        ("step_time", ["step_time"]),
        ("straggler", ["straggler"]),
        ("memory", ["memory", "graph", "host_memory", "objects"]),
    ],
)
def test_what_is_expected_is_a_note_and_nothing_else_is(name: str, covers: list[str]) -> None:
    expected = Expected({f"stable_training:{name}": "on purpose", "ddp_parity": "another check"})
    assert f"stable_training:{name}" in EXPECTABLE
    assert [one.kind for one in expected.others([None, *FOUND])] == [
        one.kind for one in FOUND if one.kind not in covers
    ]
    assert expected.notes == [f"expected (on purpose): {kind} it is" for kind in covers]


def test_nothing_is_expected() -> None:
    expected = Expected({"stable_training": "all of it"})
    assert expected.others(FOUND) == FOUND
    assert not expected.notes
