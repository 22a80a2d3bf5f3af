"""docs/compatibility.md, pyproject.toml, ci/constraints.txt and ci/bounds.py say the same of versions."""

from __future__ import annotations

import re

import pytest

from ci import bounds
from tests.docs.test_examples import README, ROOT

pytest.importorskip("tomllib", reason="pyproject.toml is read with Python 3.11's tomllib")
PAGE = (ROOT / "docs" / "compatibility.md").read_text(encoding="utf-8")
TABLE = {
    name: (lowest, everyday, newest)
    for name, lowest, everyday, newest in re.findall(
        r"^\| ([\w-]+) \| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \|$",
        PAGE,
        re.MULTILINE,
    )
}


def same(one: str, other: str) -> bool:
    """3.5 is 3.5.0."""
    return re.sub(r"(\.0)+$", "", one) == re.sub(r"(\.0)+$", "", other)


def test_lower_bounds_are_those_that_were_run() -> None:
    declared = {name: low for name, low in bounds.declared().items() if name not in bounds.TESTS_IMPORT}
    assert declared.keys() == TABLE.keys() - {"Python"}
    assert {name: low for name, low in declared.items() if not same(low, TABLE[name][0])} == {}


def test_everyday_versions_are_those_of_the_constraints() -> None:
    lines = (ROOT / "ci" / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pinned = dict(line.lower().split("==") for line in lines if "==" in line)
    assert {name: TABLE[name][1] for name in TABLE.keys() - {"Python"}} == {
        name: pinned[name] for name in TABLE.keys() - {"Python"}
    }


def test_pythons_are_those_that_were_run() -> None:
    lowest, everyday, newest = TABLE["Python"]
    others = re.findall(r"^- \*\*Python ([\d.]+)\*\*", PAGE, re.MULTILINE)
    ran = [version.rpartition(".")[0] for version in (lowest, everyday, *others, newest)]
    assert bounds.pythons() == ran
    assert bounds.project()["requires-python"] == f">={ran[0]}"
    assert f"Python {ran[0]} to {ran[-1]}" in README and f"torch {bounds.declared()['torch']} to" in README


def test_what_is_asked_of_pip() -> None:
    lowest = bounds.requirements("lowest", ["torch==2.13"])
    assert "torch==2.13" in lowest and "pytest==8.4" in lowest
    assert not any(text.startswith("torch==2.8") for text in lowest)
    assert "pytest>=8.4" in bounds.requirements("newest", [])
