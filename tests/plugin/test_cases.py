"""``--gputrain-case`` becomes cases at collection, and one that cannot be loaded is a usage error."""

from __future__ import annotations

import pytest

from .conftest import Run

ASKS = """
from pytest_gputrain.plugin.cases import cases_of

def pytest_generate_tests(metafunc):
    metafunc.parametrize("case", cases_of(metafunc.config), ids=lambda case: case.name)

def test_it(case): pass
"""

MINE = """
from pytest_gputrain import TrainingCase

def nothing(*_): raise AssertionError("a model is never built at collection")

one = TrainingCase(name="one", model=nothing, batch=nothing, loss=nothing)
two = TrainingCase(name="two", model=nothing, batch=nothing, loss=nothing)
both = [one, two]
lunch = {"lunch": "why not"}
odd = TrainingCase(name="odd", model=nothing, batch=nothing, loss=nothing, expected_failures=lunch)
"""


def test_without_a_case_the_reference(pytester: pytest.Pytester, run: Run) -> None:
    pytester.makepyfile(ASKS)
    run("--collect-only").stdout.fnmatch_lines(["*test_it[[]gpt[]]*"])


def test_cases_given(pytester: pytest.Pytester, run: Run) -> None:
    pytester.makepyfile(ASKS, mine=MINE)
    result = run("-v", "--gputrain-case=mine:both", "--gputrain-case=mine:one")
    result.assert_outcomes(passed=3)


@pytest.mark.parametrize(
    ("spec", "message", "workers"),
    [
        ("mine:three", "case: mine has no attribute 'three'; *", []),
        ("nowhere:one", "case: no module named 'nowhere' for 'nowhere:one'; *", []),
        ("mine:nothing", "case: mine:nothing() raised AssertionError: *", []),
        ("mine:nothing", "case: mine:nothing() raised AssertionError: *", ["-n", "2"]),
        ("mine:MINE", "case: mine has no attribute 'MINE'; *", []),
        ("mine:odd", "case 'odd': expected_failures names lunch, which is no check; *", []),
    ],
)
def test_a_case_that_cannot_be_loaded_is_a_usage_error(
    pytester: pytest.Pytester, run_each_way: Run, spec: str, message: str, workers: list[str]
) -> None:
    pytester.makepyfile(ASKS, mine=MINE)
    result = run_each_way(f"--gputrain-case={spec}", *workers)
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines([f"ERROR: --gputrain-case (from the command line): {message}"])
    assert "Traceback" not in result.stdout.str() + result.stderr.str()


def test_a_session_without_checks_loads_no_case(pytester: pytest.Pytester, run: Run) -> None:
    pytester.makepyfile("def test_nothing(): pass")
    run("--gputrain-case=nowhere:one").assert_outcomes(passed=1)
