"""docs/reference.md knows every public name, and nothing that is gone; the index knows every page."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import pytest_gputrain
from pytest_gputrain import schemas
from pytest_gputrain.batch import cache
from pytest_gputrain.plugin.settings_table import SETTINGS
from pytest_gputrain.report import reading
from pytest_gputrain.sweep import manifest, results
from pytest_gputrain.variables import NAMES
from tests.docs import reference

DOCS = reference.PAGE.parent
TEXT = reference.PAGE.read_text(encoding="utf-8")
# Hooks are pytest's to call, and this is the fixture behind `compile_monitor`.
NOT_FOR_USERS = {name for name in pytest_gputrain.__all__ if name.startswith("pytest_")}
NOT_FOR_USERS |= {"compile_monitor_fixture"}


def part(title: str) -> str:
    return TEXT.split(f"\n## {title}", 1)[1].split("\n## ", 1)[0]


def first_column(text: str) -> list[str]:
    cells = re.findall(r"^\| (`[^|]*) \|", text, re.MULTILINE)
    return [name for cell in cells for name in re.findall(r"`([^`]+)`", cell)]


def test_public_names() -> None:
    names = first_column(part("Python")) + first_column(part("Fixtures"))
    assert set(names) == set(pytest_gputrain.__all__) - NOT_FOR_USERS


def test_variables() -> None:
    here = first_column(part("Environment"))
    twins = [setting.variable for setting in SETTINGS]
    assert sorted([*here, *twins]) == sorted(NAMES)


def test_schemas() -> None:
    told = set(re.findall(r"`(gputrain\.[a-z-]+)`, (\d+)", part("JSON")))
    assert told == {(name, str(version)) for name, version in schemas.SCHEMAS.items()}
    assert schemas.SCHEMAS[reading.SCHEMA] == reading.VERSION
    formats = set(re.findall(r"`format` `([^`]+)`, (\d+)", part("JSON")))
    rooms = (cache, manifest, results)
    assert formats == {(str(room.FORMAT), str(room.VERSION)) for room in rooms}


def test_the_command_line() -> None:
    fresh = reference.put_in(TEXT)
    assert fresh == TEXT, "options have changed: python -m tests.docs.reference"


def test_the_index_knows_every_page() -> None:
    index = (DOCS / "README.md").read_text(encoding="utf-8")
    pages = {path.name for path in DOCS.glob("*.md")} - {"README.md"}
    assert set(re.findall(r"\]\(([\w-]+\.md)", index)) == pages


PAGES = [*DOCS.glob("*.md"), DOCS.parent / "README.md", DOCS.parent / "CONTRIBUTING.md"]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_leads_somewhere(page: Path) -> None:
    text = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    links = [link for link in re.findall(r"\]\(([^)#\s]+)[^)]*\)", text) if "://" not in link]
    assert [link for link in links if not (page.parent / link).exists()] == []
