"""The body of a test, on a rank: its fixtures arrive, it runs, and how it ended goes back as pytest tells it.

A failure goes back three times: as the launch's own text, as pytest's representation of the traceback, made
here where the frames are, and as the exception itself, so that ``xfail(raises=…)`` knows it.
"""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pytest

from pytest_gputrain.launch import payload, rank
from pytest_gputrain.plugin.known_there import VALUES, torch_device
from pytest_gputrain.plugin.rank_asserts import Explaining, explained
from pytest_gputrain.plugin.rank_fixtures import arrived

Filter = tuple[Any, str, type[Warning], str, int]
"""Action, pattern of the message, category, pattern of the module, line."""


class Showing(NamedTuple):
    """How tracebacks are shown in this session."""

    style: str
    full: bool
    locals: bool
    truncate: bool
    invoked_in: str


class Body(NamedTuple):
    """A test's body on its way to the ranks. ``call`` is read there, when the rank knows its number."""

    call: bytes
    device: str
    showing: Showing
    explaining: bytes
    filters: tuple[Filter, ...]


class Warned(NamedTuple):
    """A warning that the test would have shown in pytest's summary."""

    text: str
    category: type[Warning]
    file: str
    line: int


class Finished(NamedTuple):
    """What a rank returns. ``xfailed`` is the reason given to ``pytest.xfail`` if the body called it."""

    xfailed: str | None
    warned: list[Warned]


class Failure(NamedTuple):
    """What a rank attaches to its exception; each part travels alone, since each may be unable to."""

    shown: bytes
    exception: bytes
    bare: bytes
    warned: list[Warned]


def run_body(body: Body) -> Finished:
    """Run on a rank, the process group ready."""
    import torch.distributed as dist

    VALUES.update(rank=dist.get_rank(), world_size=dist.get_world_size(), device=torch_device(body.device))
    function, _, sent = payload.unpack_call(body.call)
    known: Explaining = payload.unpack_value(body.explaining)
    with contextlib.ExitStack() as stack:
        warned = stack.enter_context(_warnings_as(body.filters))
        stack.enter_context(explained(known))
        try:
            xfailed = _call(function, sent)
        except BaseException as error:  # pytest's outcomes too
            failure = _failure(error, body.showing, list(map(_told, warned)))
            setattr(error, rank.ATTACHED, payload.pack_value(failure))
            raise
        return Finished(xfailed, list(map(_told, warned)))


def _call(function: Callable[..., object], sent: dict[str, object]) -> str | None:
    """Call the test with what was sent. Returns the reason if it called ``pytest.xfail``."""
    with contextlib.ExitStack() as stack:
        arguments = {name: stack.enter_context(arrived(value)) for name, value in sent.items()}
        try:
            value = function(**arguments)
        except pytest.xfail.Exception as error:
            # Not a failure of the launch: whether it counts depends on what the other ranks do.
            return str(error.msg) or "no reason given"
        if value is not None:
            kind = pytest.PytestReturnNotNoneWarning
            warnings.warn(
                kind(f"the test returned a {type(value)!r}, not None: did you mean assert?"), stacklevel=1
            )
        return None


@contextlib.contextmanager
def _warnings_as(filters: tuple[Filter, ...]) -> Iterator[list[warnings.WarningMessage]]:
    """The filters of the test (ini, ``-W``, marks), and a list that collects what passes them."""
    with warnings.catch_warnings(record=True) as log:
        warnings.resetwarnings()
        for action, message, category, module, line in reversed(filters):
            warnings.filterwarnings(action, message, category, module, line)
        yield log


def _told(one: warnings.WarningMessage) -> Warned:
    return Warned(str(one.message), one.category, one.filename, one.lineno)


def _failure(error: BaseException, showing: Showing, warned: list[Warned]) -> Failure:
    kind, text = type(error), rank.safe_str(error)
    return Failure(
        _packed(lambda: _shown(error, showing)),
        _packed(lambda: error.with_traceback(error.__traceback__)),
        _packed(lambda: (kind, text)),
        warned,
    )


def _packed(make: Callable[[], object]) -> bytes:
    """What ``make`` returns as bytes; none where it cannot be made or sent: foreign code runs in both."""
    try:
        return payload.pack_value(make())
    except Exception:
        return b""


def _shown(error: BaseException, showing: Showing) -> object:
    """pytest's own representation of an exception, as ``--tb`` and ``--showlocals`` want it."""
    tb = rank.skip_machinery(error.__traceback__)
    assert tb is not None
    found = pytest.ExceptionInfo.from_exc_info((type(error), error.with_traceback(tb), tb))
    style: Any = "long" if showing.style == "auto" or showing.full else showing.style
    if isinstance(error, pytest.fail.Exception) and not error.pytrace:
        style = "value"
    return found.getrepr(
        style=style,
        funcargs=True,
        showlocals=showing.locals,
        truncate_locals=showing.truncate,
        abspath=_cwd() != showing.invoked_in,
        tbfilter=False if showing.full else _filter(showing.style == "auto"),
    )


def _filter(shorten: bool) -> Callable[[pytest.ExceptionInfo[BaseException]], Any]:
    """Hides what asks to be hidden and, for ``--tb=auto``, shortens all but the first and the last entry."""

    def chosen(found: pytest.ExceptionInfo[BaseException]) -> Any:
        entries = found.traceback.filter(found)
        if shorten and len(entries) > 2:
            middle = [entry.with_repr_style("short") for entry in entries[1:-1]]
            return type(entries)([entries[0], *middle, entries[-1]])
        return entries

    return chosen


def _cwd() -> str | None:
    try:
        return os.getcwd()
    except OSError:
        return None
