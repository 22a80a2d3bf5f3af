"""What ranks printed, as sections of a report: shown where pytest shows captured output, and in JUnit.

Of an ordinary test, the sections are added when it failed, or when a launch in it did. What the failure text
shows already is not shown a second time on the terminal: such a section is added after the test's own report,
where JUnit (with ``junit_logging``) still finds it. All of it happens where the test runs, so a report is the
same with and without xdist.
"""

from __future__ import annotations

import sys
from collections import deque
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple

import pytest

from pytest_gputrain.plugin import properties

if TYPE_CHECKING:
    from pytest_gputrain.launch import LaunchResult

_STREAMS = ("stdout", "stderr")
# A report travels between processes and into one XML file; the whole output is in the artifacts.
_HEAD, _TAIL = 4 * 1024, 12 * 1024
_MOST_OF_A_TEST = 256 * 1024
_MOST_LAUNCHES = 8


class _Section(NamedTuple):
    """One rank's stream; ``shown`` is what a failure text shows of it."""

    key: str
    content: str
    shown: str = ""


class _Launch(NamedTuple):
    """What a report needs of a launch: not the launch itself, which may hold tensors and a folder."""

    number: int
    failed: bool
    artifacts: Path | None
    sections: tuple[_Section, ...]


_LAUNCHES = pytest.StashKey["deque[_Launch]"]()
_POSTPONED = pytest.StashKey["list[tuple[str, _Section]]"]()


def add_rank_sections(
    item: pytest.Item, result: LaunchResult, when: Literal["setup", "call", "teardown"] = "call"
) -> None:
    """Add a section a rank and stream: ``Captured stdout of rank 0 call``; none for what stayed empty.

    pytest decides who sees them, as for its own captured output: ``-rP``, ``--show-capture`` and
    ``junit_logging`` work. Under ``-s`` the text goes to the terminal instead, a mark before each line.
    """
    launches = item.stash.get(_LAUNCHES, deque())
    for noted in [launch for launch in launches if launch.number == result.folder.number]:
        launches.remove(noted)
    if item.config.getoption("capture") != "no":
        for section in _sections(result):
            item.add_report_section(when, section.key, section.content)
        return
    for rank in result.ranks:
        for name in _STREAMS:
            if text := getattr(rank, name).rstrip("\n"):
                stream = getattr(sys, name)
                stream.write("".join(f"[rank {rank.rank}] {line}\n" for line in text.split("\n")))
                stream.flush()


def note_launch(item: pytest.Item, result: LaunchResult, *, kept: bool) -> None:
    """Remember a launch for the test's report; ``kept``: its artifacts outlive it."""
    from pytest_gputrain.launch import Verdict

    failed = result.verdict not in (Verdict.PASSED, Verdict.SKIPPED)
    launches = item.stash.setdefault(_LAUNCHES, deque(maxlen=_MOST_LAUNCHES))
    artifacts = result.artifacts if failed and kept else None
    launches.append(_Launch(result.folder.number, failed, artifacts, tuple(_sections(result))))


def complete(item: pytest.Item, call: pytest.CallInfo[None]) -> None:
    """Add to the item what belongs into the report of this phase, which is about to be made."""
    failure = _failure_text(call)
    postponed = item.stash.setdefault(_POSTPONED, [])
    for section in [*_labels(item, call.when), *_taken(item, call.when, failure is not None)]:
        if failure is not None and section.shown in failure:
            postponed.append((call.when, section))
        else:
            item.add_report_section(call.when, section.key, section.content)
    if call.when == "teardown":
        for when, section in postponed:
            item.add_report_section(when, section.key, section.content)
        postponed.clear()


def _labels(item: pytest.Item, when: str) -> list[_Section]:
    told = properties.texts(item, properties.SHARED) if when == "call" else []
    return [_Section("stdout of gputrain", f"[gputrain] {text}\n", text) for text in told]


def _taken(item: pytest.Item, when: str, test_failed: bool) -> list[_Section]:
    """The sections of the launches of this phase, which are then forgotten."""
    launches = item.stash.get(_LAUNCHES, deque())
    relevant = [launch for launch in launches if launch.failed or test_failed]
    for launch in relevant:
        if launch.artifacts is not None:
            properties.add(item, properties.ARTIFACTS, launch.artifacts)
    if relevant or when != "setup":  # what a fixture launched may yet be asked for by the test's own report
        launches.clear()
    return _bounded(relevant)


def _failure_text(call: pytest.CallInfo[None]) -> str | None:
    if call.excinfo is None or call.excinfo.errisinstance(pytest.skip.Exception):
        return None
    try:
        return str(call.excinfo.value)
    except Exception:  # an exception of the user's whose __str__ raises
        return ""


def _sections(result: LaunchResult) -> list[_Section]:
    from pytest_gputrain.launch.result import shown_lines

    found = []
    for rank in result.ranks:
        for name in _STREAMS:
            if (text := getattr(rank, name)).strip():
                # JUnit joins all sections whose title starts with "Captured stdout", and drops the titles.
                content = f"[rank {rank.rank}]\n{_cut(text)}"
                found.append(_Section(f"{name} of rank {rank.rank}", content, shown_lines(rank, name)))
    return found


def _cut(text: str) -> str:
    if len(text) <= _HEAD + _TAIL:
        return text
    num_cut = len(text) - _HEAD - _TAIL
    return f"{text[:_HEAD]}\n[... {num_cut:,} characters left out; see the artifacts ...]\n{text[-_TAIL:]}"


def _bounded(launches: list[_Launch]) -> list[_Section]:
    """The sections of several launches, numbered, as many as a report should carry."""
    found: list[_Section] = []
    room = _MOST_OF_A_TEST
    for number, launch in enumerate(launches, 1):
        for section in launch.sections:
            room -= len(section.content)
            if room < 0:
                said = "output of further ranks is left out here; see the artifacts\n"
                return [*found, _Section("stdout of further ranks", said, said)]
            key = f"{section.key}, launch {number}" if len(launches) > 1 else section.key
            found.append(section._replace(key=key))
    return found
