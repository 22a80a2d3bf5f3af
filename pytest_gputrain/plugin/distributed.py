"""``@pytest.mark.distributed``: the body of a test on every rank, one result in the report.

Fixtures are set up and torn down once, in the pytest process; their values travel with the body.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Generator
from typing import Any, NoReturn

import pytest

from pytest_gputrain.launch import LaunchResult, LaunchUsageError, Verdict, payload
from pytest_gputrain.plugin.distributed_plan import DistributedPlan, distributed_plan
from pytest_gputrain.plugin.known_there import alone_device, device_name
from pytest_gputrain.plugin.launcher import launcher_for
from pytest_gputrain.plugin.rank_asserts import explaining_of
from pytest_gputrain.plugin.rank_body import Body, Filter, Finished, Showing, run_body
from pytest_gputrain.plugin.rank_failure import Shown, attached, failure_of, mixed_xfail, refusal
from pytest_gputrain.plugin.rank_fixtures import here_only, standing_for
from pytest_gputrain.plugin.sections import add_rank_sections
from pytest_gputrain.plugin.settings import settings_of

_SHOWN = pytest.StashKey[Shown]()
_SKIPPED_AT = pytest.StashKey["tuple[str, int]"]()


class DistributedHooks:
    """Registered once a test is marked, so that other sessions pay nothing."""

    # Before pytest's own, which would run the body here.
    @pytest.hookimpl(tryfirst=True)
    def pytest_pyfunc_call(self, pyfuncitem: pytest.Function) -> bool | None:
        __tracebackhide__ = True
        mark = pyfuncitem.get_closest_marker("distributed")
        if mark is None:
            return None
        plan = distributed_plan(mark)
        if settings_of(pyfuncitem.config).alone:
            from pytest_gputrain.plugin.alone import run_alone

            run_alone(pyfuncitem.obj, arguments_of(pyfuncitem), alone_device(pyfuncitem, plan))
        else:
            _run_on_ranks(pyfuncitem, plan)
        return True

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(
        self, item: pytest.Item, call: pytest.CallInfo[None]
    ) -> Generator[None, pytest.TestReport, pytest.TestReport]:
        """Show the ranks' tracebacks instead of the launch's."""
        report = yield
        shown = item.stash.get(_SHOWN, None)
        if call.excinfo is None or call.when != "call":
            return report
        if shown is not None and call.excinfo.value is shown.exception:
            report.longrepr = shown.text
        elif report.skipped and isinstance(report.longrepr, tuple) and _SKIPPED_AT in item.stash:
            report.longrepr = (*item.stash[_SKIPPED_AT], report.longrepr[2])
        return report


def arguments_of(item: pytest.Function) -> dict[str, Any]:
    """The arguments that pytest would call the test with."""
    parameters = inspect.signature(item.obj).parameters.values()
    wanted = [one.name for one in parameters if one.default is one.empty]
    return {name: item.funcargs[name] for name in wanted if name in item.funcargs}


def _run_on_ranks(item: pytest.Function, plan: DistributedPlan) -> None:
    __tracebackhide__ = True
    launcher = launcher_for(item, None)
    body = Body(
        _packed_call(item, arguments_of(item)),
        device_name(item, plan),
        _showing(item.config),
        _explaining(item),
        _filters(),
    )
    try:
        result = launcher(run_body, body, check=False, **plan._asdict())
    except LaunchUsageError as error:
        why = str(error)
    else:
        add_rank_sections(item, result, "call")
        _tell_warnings(result)
        return _conclude(item, result)
    # Out here: within the block the same line would be shown a second time, as the context of this one.
    _raise(item, refusal(item, why))


def _conclude(item: pytest.Function, result: LaunchResult) -> None:
    """Return if the test passed, and raise what it came to otherwise."""
    __tracebackhide__ = True
    if result.verdict is Verdict.SKIPPED:
        _skip(item, result)
    if result.passed:
        shown = mixed_xfail(item, result)
        if shown is None and (reason := result.values[0].xfailed) is not None:
            pytest.xfail(reason)
    else:
        shown = failure_of(item, result, _notes(item, result))
    if shown is not None:
        _raise(item, shown)


def _raise(item: pytest.Function, shown: Shown) -> NoReturn:
    __tracebackhide__ = True
    item.stash[_SHOWN] = shown
    raise shown.exception


def _notes(item: pytest.Function, result: LaunchResult) -> list[str]:
    notes = []
    if settings_of(item.config).report:
        notes.append(f"artifacts: {result.artifacts}")
    if item.config.getoption("usepdb", False):
        notes.append(
            "--pdb cannot enter ranks, which are processes of their own; this runs the body as one rank in "
            f"pytest's process: pytest --pdb --gputrain-alone '{item.nodeid}'"
        )
    return notes


def _skip(item: pytest.Function, result: LaunchResult) -> None:
    __tracebackhide__ = True
    error = result.ranks[0].error
    file, _, line = (error.location if error and error.location else "").partition(" in ")[0].rpartition(":")
    if line.isdigit():
        item.stash[_SKIPPED_AT] = (file, int(line))
    pytest.skip(error.message if error else "every rank skipped")


def _packed_call(item: pytest.Function, arguments: dict[str, Any]) -> bytes:
    """The call as bytes, in one piece: a model and its optimizer stay each other's. Names what cannot go."""
    __tracebackhide__ = True
    why = next((f"the fixture {name!r} {reason}" for name in arguments if (reason := here_only(name))), None)
    if why is None:
        sent = {name: standing_for(name, value) for name, value in arguments.items()}
        try:
            return payload.pack_call(item.obj, (), sent)
        except LaunchUsageError as error:
            why = next((text for name, value in sent.items() if (text := _refused(name, value))), str(error))
    _raise(item, refusal(item, why))


def _refused(name: str, value: object) -> str | None:
    try:
        payload.pack_by_value(value, f"the value of the fixture {name!r}")
    except LaunchUsageError as error:
        way_out = "make it in the test, or let the fixture return a function that makes it"
        return f"{str(error).partition('; create what')[0]}; {way_out}"
    return None


def _showing(config: pytest.Config) -> Showing:
    return Showing(
        style=config.getoption("tbstyle"),
        full=bool(config.getoption("fulltrace")),
        locals=bool(config.getoption("showlocals")),
        truncate=config.get_verbosity() <= 1,
        invoked_in=str(config.invocation_params.dir),
    )


def _filters() -> tuple[Filter, ...]:
    """The warning filters of this test, its marks included."""
    patterns: list[list[Any]] = [[getattr(part, "pattern", part) for part in one] for one in warnings.filters]
    return tuple(
        (action, message or "", category, module or "", line)
        for action, message, category, module, line in patterns
    )


def _explaining(item: pytest.Function) -> bytes:
    known = explaining_of(item)
    try:
        return payload.pack_by_value(known)
    except LaunchUsageError:  # hooks of a plugin that cannot travel: assertions are explained without them
        return payload.pack_by_value(known._replace(hooks=()))


def _tell_warnings(result: LaunchResult) -> None:
    """Warn here of what ranks warned of, each once, so that it is in pytest's summary."""
    told: set[tuple[Any, ...]] = set()
    for rank in result.ranks:
        found = rank.value if isinstance(rank.value, Finished) else attached(rank)
        for one in found.warned if found else ():
            # Not the category itself: a class made on a rank is another one on each.
            if (key := (one.text, one.category.__qualname__, one.file, one.line)) not in told:
                told.add(key)
                try:
                    warnings.warn_explicit(one.text, one.category, one.file, one.line)
                except Warning:  # an error here, and the test had allowed it
                    continue
