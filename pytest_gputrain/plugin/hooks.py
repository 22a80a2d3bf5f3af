"""The hooks, thin: each hands over to the module that knows. Re-exported by the package, which is the plugin.

Only what every session needs is imported here; what costs time is imported by the hook that needs it.
"""

from __future__ import annotations

import sys
from collections.abc import Generator

import pytest

from pytest_gputrain.plugin import cases, leasing, markers, properties, settings, terminal
from pytest_gputrain.plugin.xdist import XdistHooks, refusals

_sessions: list[pytest.Config] = []
"""Those that run in this process, the outermost first: pytester runs sessions inside of a test."""


def is_xdist_worker(config: pytest.Config) -> bool:
    """Whether this process runs tests for another one that reports them."""
    return hasattr(config, "workerinput")


def pytest_addoption(parser: pytest.Parser) -> None:
    settings.add_options(parser)


def pytest_configure(config: pytest.Config) -> None:
    _sessions.append(config)
    markers.register(config)
    resolved = settings.resolve(config)
    terminal.check_pretended_gpus()
    if not is_xdist_worker(config):
        from pytest_gputrain.plugin.lease_timeline import LeaseTimeline

        config.pluginmanager.register(terminal.Ledger(resolved.require_gpus or 0), "gputrain-ledger")
        config.pluginmanager.register(LeaseTimeline(resolved.report), "gputrain-timeline")
    if resolved.report is not None:
        from pytest_gputrain.plugin import recording

        config.pluginmanager.register(recording.Recording(config, resolved.report), recording.NAME)
    config.pluginmanager.register(leasing.LeaseSession(), "gputrain-leases")
    config.pluginmanager.register(FirstLook(), "gputrain-first-look")
    if hasattr(config.hook, "pytest_testnodedown"):  # whatever name xdist was loaded by
        config.pluginmanager.register(XdistHooks(), "gputrain-xdist")


# Last: after the summary and what pytest says of an interrupt.
@pytest.hookimpl(trylast=True)
def pytest_unconfigure(config: pytest.Config) -> None:
    if (progress := sys.modules.get("pytest_gputrain.endurance.progress")) is not None:
        for line in progress.last_words():
            leasing.say(config, f"gputrain: {line}")
    if config in _sessions:
        _sessions.remove(config)
    if _sessions:  # fork servers and idle ranks are the outer session's, which goes on
        return
    # Only a session that launched has fork servers to end; importing the room to ask would cost the others.
    if (launch := sys.modules.get("pytest_gputrain.launch")) is not None:
        launch.shutdown()


def pytest_report_header(config: pytest.Config) -> list[str]:
    return terminal.header(settings.settings_of(config))


# Before the terminal and xdist, so that not even a worker starts when GPUs are missing.
@pytest.hookimpl(tryfirst=True)
def pytest_sessionstart(session: pytest.Session) -> None:
    num_gpus = settings.settings_of(session.config).require_gpus or 0
    if num_gpus and not is_xdist_worker(session.config) and (lack := terminal.missing_gpus(num_gpus)):
        pytest.exit(lack, returncode=pytest.ExitCode.TESTS_FAILED)


class FirstLook:
    """Before the user's conftests, whose hooks may ask for the marker ``gpu``."""

    @pytest.hookimpl(tryfirst=True)
    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[pytest.Item]) -> None:
        with refusals(config, items):
            cases.raise_refused(config)
            markers.prepare(items)


# After the user's conftests, whose hooks may add markers, and before pytest's own -m, which asks for them:
# of hooks without an order the last registered comes first.
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    with refusals(config, items):
        markers.prepare(items)


# Outermost: the wait for GPUs is over before pytest-timeout, whose hook this is too, starts its clock.
@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    with leasing.leased(item):
        return (yield)


# So that checks which a test calls by parametrize_with_checks keep to this session's options.
@pytest.hookimpl(wrapper=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> Generator[None, object, object]:
    markers.raise_too_late(pyfuncitem)
    parameters = getattr(pyfuncitem, "callspec", None)
    if not parameters or "check" not in parameters.params or "pytest_gputrain.checks" not in sys.modules:
        return (yield)
    from pytest_gputrain.checks.context import SESSION_COMPILE_REPORT, SESSION_LAUNCHER
    from pytest_gputrain.plugin.launcher import launcher_for
    from pytest_gputrain.plugin.stability import progress_shown

    report = settings.settings_of(pyfuncitem.config).report
    tokens = (
        SESSION_LAUNCHER.set(launcher_for(pyfuncitem, None)),
        SESSION_COMPILE_REPORT.set(str(report / "compile") if report else None),
    )
    try:
        with progress_shown(pyfuncitem.config):
            return (yield)
    finally:
        SESSION_LAUNCHER.reset(tokens[0])
        SESSION_COMPILE_REPORT.reset(tokens[1])


# Before the report is made: it takes the sections that its item has by then.
@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    # Of a session that launched nothing nothing is to be told; importing the module to ask would cost it.
    if "pytest_gputrain.plugin.sections" in sys.modules or properties.has(item, properties.SHARED):
        from pytest_gputrain.plugin.sections import complete

        complete(item, call)
    if "pytest_gputrain.plugin.memory" in sys.modules:
        from pytest_gputrain.plugin import memory

        memory.complete(item, call)
    if "pytest_gputrain.plugin.compile" in sys.modules:
        from pytest_gputrain.plugin import compile as compile_monitors

        compile_monitors.complete(item, call)
    return (yield)


# A wrapper: the skip mark must be there before pytest's own skipping, which then reports the test's location.
@pytest.hookimpl(wrapper=True)
def pytest_runtest_setup(item: pytest.Item) -> Generator[None, None, None]:
    if refusal := leasing.refused(item):
        pytest.fail(refusal, pytrace=False)
    if reason := markers.skip_reason(item):
        item.add_marker(pytest.mark.skip(reason=reason))
    return (yield)
