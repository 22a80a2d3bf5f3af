"""From what the ranks of a test came to, to what pytest reports: an exception, and how it is shown."""

from __future__ import annotations

import contextlib
import re
from typing import TYPE_CHECKING, Any, NamedTuple

import pytest

from pytest_gputrain.launch import RankError, RankResult, Verdict, output, payload
from pytest_gputrain.launch.result import fate
from pytest_gputrain.plugin.launcher import LaunchFailure
from pytest_gputrain.plugin.rank_body import Failure, Finished

if TYPE_CHECKING:
    from pytest_gputrain.launch import LaunchResult

_MOST_TRACEBACKS = 4
_ADDRESS = re.compile(r"\b0x[0-9a-f]{6,}")
"""Where an object lies differs between ranks, and says nothing."""
_NOT_RAISED_HERE = (KeyboardInterrupt, GeneratorExit)
"""These would end the session: a rank's is that rank's alone."""


class Alike(NamedTuple):
    """Ranks that raised the same at the same place."""

    ranks: list[int]
    error: RankError
    failure: Failure | None


class Shown(NamedTuple):
    """What pytest reports: the exception that the test is said to have raised, and its text."""

    exception: BaseException
    text: Any


def failure_of(item: pytest.Item, result: LaunchResult, notes: list[str]) -> Shown:
    """Return what to report for a launch that is neither green nor skipped. ``notes`` go below the cause."""
    groups = _alike(result)
    if not groups:
        head, *lines = result.summary(printed=False).splitlines()
        text = "\n".join([head, *(f"  {line}" for line in [*_xfailed(result), *notes]), *lines])
        return Shown(LaunchFailure(result), _located(_text(text), item, head))
    first = groups[0]
    who = output.rank_list(first.ranks)
    place = f"   at {first.error.location}" if first.error.location else ""
    head = f"{result.verdict} after {result.seconds:.1f} s: {who} raised {first.error.headline}{place}"
    told = {number for group in groups for number in group.ranks}
    fates = {rank.rank: fate(rank) for rank in result.ranks if rank.rank not in told}
    lines = [result.shared_gpu] if result.shared_gpu else []
    lines += [output.told_of(ranks, text) for ranks, text in output.grouped(fates)]
    lines += [
        f"{output.rank_list(group.ranks)}: raised {group.error.headline}   at {group.error.location}"
        for group in groups[1:]
    ]
    lines = [head, *(f"  {line}" for line in [*lines, *_xfailed(result), *notes])]
    return Shown(_exception(groups) or LaunchFailure(result), _joined(item, lines, groups, who))


def mixed_xfail(item: pytest.Item, result: LaunchResult) -> Shown | None:
    """What is wrong when some ranks called ``pytest.xfail`` and others went on, or None."""
    xfailed = _xfailed(result)
    if not xfailed or all(_reason(rank) is not None for rank in result.ranks):
        return None
    others = output.rank_list(rank.rank for rank in result.ranks if _reason(rank) is None)
    why = f"{xfailed[0]} while {others} passed: xfail on all ranks or on none"
    text = f"{Verdict.FAILED} after {result.seconds:.1f} s: {why}"
    return Shown(LaunchFailure(result), _located(_text(text), item, text))


def refusal(item: pytest.Item, why: str) -> Shown:
    """A test whose body cannot be sent to the ranks at all."""
    return Shown(pytest.fail.Exception(why, pytrace=False), _located(_text(why), item, why))


def attached(rank: RankResult) -> Failure | None:
    """What a rank attached to its exception."""
    with contextlib.suppress(Exception):  # unpickling runs foreign code
        found = payload.unpack_value(rank.attached)
        return found if isinstance(found, Failure) else None
    return None


def _alike(result: LaunchResult) -> list[Alike]:
    """Ranks that raised something of their own, those of the cause first."""
    groups: dict[tuple[str, str, str | None], Alike] = {}
    cause = result.cause.rank if result.cause else None
    for rank in sorted(result.ranks, key=lambda rank: (rank.rank != cause, rank.rank)):
        if rank.state == "failed" and rank.error and not rank.error.is_victim:
            key = (rank.error.type, _ADDRESS.sub("0x", rank.error.message), rank.error.location)
            if key in groups:
                groups[key].ranks.append(rank.rank)
            else:
                groups[key] = Alike([rank.rank], rank.error, attached(rank))
    first = next(iter(groups.values()), None)
    # A crash elsewhere, or a wait that ended in vain, is told by the launch's own text.
    return list(groups.values()) if first and cause in first.ranks else []


def _exception(groups: list[Alike]) -> BaseException | None:
    """The exception of the cause, if it can be had and all ranks agree on its type.

    Where they do not, no ``xfail(raises=…)`` may take the one for the whole.
    """
    failure = groups[0].failure
    if failure is None or len({group.error.type for group in groups}) > 1:
        return None
    found: object = None
    with contextlib.suppress(Exception):
        found = payload.unpack_value(failure.exception)
    if not isinstance(found, BaseException):
        with contextlib.suppress(Exception):
            kind, text = payload.unpack_value(failure.bare)
            found = kind.__new__(kind, text)
    good = isinstance(found, BaseException) and not isinstance(found, _NOT_RAISED_HERE)
    return found if good else None  # type: ignore[return-value]


def _joined(item: pytest.Item, head: list[str], groups: list[Alike], who: str) -> Any:
    """One text: the head, then the traceback of each group under the names of its ranks."""
    chain: list[tuple[Any, Any, str | None]] = []
    seen: dict[str | None, Any] = {}
    for group in groups:
        if group.error.location in seen or len(seen) == _MOST_TRACEBACKS:
            continue  # the same line with other values: said in the head
        if len(groups) > 1:
            head.append(f"--- {output.rank_list(group.ranks)}")
        shown = seen[group.error.location] = _representation(group)
        chain += [(_text("\n".join(head)).reprtraceback, None, None), *_chain(shown)]
        head = []
    crash = next(iter(seen.values())).reprcrash or _located(_text(""), item, "").reprcrash
    crash.message = f"{who}: {crash.message or groups[0].error.headline}"  # what the short summary shows
    # pytest takes the place of the whole from the last part.
    chain = [(part, None, between) for part, _, between in chain[:-1]] + [(chain[-1][0], crash, None)]
    return type(_text(""))(chain)


def _representation(group: Alike) -> Any:
    """pytest's representation of a traceback; plain text where the rank could not make or send one."""
    with contextlib.suppress(Exception):
        if group.failure and (shown := payload.unpack_value(group.failure.shown)) is not None:
            return shown
    return _text(group.error.traceback.rstrip())


def _chain(shown: Any) -> Any:
    """The exception with those that led to it; ``--tb=native`` makes one text of all."""
    return getattr(shown, "chain", None) or [(shown.reprtraceback, shown.reprcrash, None)]


def _text(text: str) -> Any:
    """Plain text in the form in which pytest takes tracebacks."""
    try:
        pytest.fail(text, pytrace=False)
    except pytest.fail.Exception as error:
        return pytest.ExceptionInfo.from_exception(error).getrepr(style="value")


def _located(shown: Any, item: pytest.Item, message: str) -> Any:
    """``shown``, with the test as the place and ``message`` for the short summary."""
    path, line, _ = item.location
    if shown.reprcrash is not None:
        shown.reprcrash.path, shown.reprcrash.lineno = path, (line or 0) + 1
        shown.reprcrash.message = message
    return shown


def _reason(rank: RankResult) -> str | None:
    return rank.value.xfailed if isinstance(rank.value, Finished) else None


def _xfailed(result: LaunchResult) -> list[str]:
    reasons = {rank.rank: f"called pytest.xfail({_reason(rank)!r})" for rank in result.ranks if _reason(rank)}
    return [f"{output.rank_list(ranks)} {text}" for ranks, text in output.grouped(reasons)]
