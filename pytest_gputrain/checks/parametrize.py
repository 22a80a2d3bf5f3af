"""``@parametrize_with_checks``: one pytest test a (case, check) pair, in the manner of scikit-learn.

Imports pytest only when it is used. At collection no model is built and no torch imported; a case given as
"MODULE:ATTR" imports its module.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from pytest_gputrain.case import TrainingCase, load_case
from pytest_gputrain.checks.compile_report_data import write_compile_report
from pytest_gputrain.checks.context import SESSION_COMPILE_REPORT, CheckContext
from pytest_gputrain.checks.preflight import check_names, preflight
from pytest_gputrain.checks.registry import chosen_ids, get_check
from pytest_gputrain.checks.result import CheckResult

if TYPE_CHECKING:
    import pytest


@functools.cache
def _failure() -> Any:
    """What a failed check raises: of a type of its own, so that an xfail expects it and nothing else.

    An unusable case, or a check that could not judge, is a plain failure, which no xfail expects.
    """
    import pytest

    # pytest types its exception as a variable, so mypy cannot see the base class.
    kind = type("CheckFailure", (pytest.fail.Exception,), {"__module__": "builtins"})
    return kind


@dataclass(frozen=True)
class BoundCheck:
    """A check to call in a test: ``check(case)``, or ``check()`` for the case it was made for.

    Skips or fails the test, the check's message first; returns the result when it passed.
    """

    id: str
    case: TrainingCase
    ctx: CheckContext

    def __call__(self, case: TrainingCase | None = None, *, launcher: Any = None) -> CheckResult:
        __tracebackhide__ = True
        return self.told(self.result(case, launcher=launcher))

    def result(self, case: TrainingCase | None = None, *, launcher: Any = None) -> CheckResult:
        """What the check came to, whatever that is. Fails the test where the case cannot be used at all."""
        import pytest

        __tracebackhide__ = True
        chosen = case or self.case
        report = self.ctx.compile_report or SESSION_COMPILE_REPORT.get()
        ctx = replace(self.ctx, launcher=launcher or self.ctx.launcher, compile_report=report)
        try:
            preflight(chosen, ctx)
            result = get_check(self.id).function(chosen, ctx)  # a check raises for bad input only
        except ValueError as error:
            pytest.fail(str(error), pytrace=False)
        write_compile_report(ctx)
        return result

    @staticmethod
    def told(result: CheckResult) -> CheckResult:
        """The result of a check that passed; skips or fails the test otherwise."""
        import pytest

        __tracebackhide__ = True
        if result.outcome == "skipped":
            pytest.skip(result.message)
        if result.outcome == "failed":
            raise _failure()(str(result), pytrace=False)
        if result.outcome == "error":
            pytest.fail(str(result), pytrace=False)
        return result

    def __repr__(self) -> str:
        return f"<check {self.id}[{self.case.name}]>"


def parametrize_with_checks(
    cases: Iterable[TrainingCase | str],
    *,
    checks: Iterable[str] | None = None,
    device: str = "cpu",
    world_size: int = 2,
    timeout: float | None = None,
    compile_backend: str | None = None,
) -> pytest.MarkDecorator | Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorate ``def test_training(case, check): check(case)``, or ``def test_training(check): check()``.

    Ids are ``test_training[gpt-ddp_parity]``. A check in a case's ``expected_failures`` is a strict xfail.
    Raises ValueError with one line for an unknown check or something that is no case.
    """
    ctx = CheckContext(device=device, world_size=world_size, timeout=timeout, compile_backend=compile_backend)
    bound = [BoundCheck(check_id, case, ctx) for case in _cases(cases) for check_id in chosen_ids(checks)]
    # An unknown name is told at collection, on the line of the decorator.
    for case in {id(check.case): check.case for check in bound}.values():
        check_names(case)

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        import pytest

        wanted = inspect.signature(function).parameters
        names = [name for name in ("case", "check") if name in wanted]
        if "check" not in names:
            raise ValueError(f"{function.__name__} takes no argument called check; write (case, check)")
        rows = [_row(check, names) for check in bound]
        decorated: Callable[..., Any] = pytest.mark.parametrize(names, rows)(function)
        return decorated

    return decorate


def _cases(cases: Iterable[TrainingCase | str]) -> list[TrainingCase]:
    if isinstance(cases, TrainingCase | str):
        raise ValueError(f"cases is {cases!r}; give a list of cases, [{cases!r}]")
    found: list[TrainingCase] = []
    for case in cases:
        if isinstance(case, str):
            found += load_case(case)
        elif isinstance(case, TrainingCase):
            found.append(case)
        else:
            raise ValueError(f"a case is a {type(case).__name__}; give a TrainingCase or 'MODULE:ATTR'")
    return found


def _row(check: BoundCheck, names: list[str]) -> Any:
    import pytest

    values = [check.case, check] if "case" in names else [check]
    return pytest.param(*values, id=f"{check.case.name}-{check.id}", marks=expected_failure(check))


def expected_failure(check: BoundCheck) -> list[Any]:
    """A strict xfail where the case's author expects one: of the check's failure, not of an error before."""
    import pytest

    reason = check.case.expected_failures.get(check.id)
    if reason is None:
        return []
    return [pytest.mark.xfail(strict=True, raises=_failure(), reason=reason)]
