"""Shipped checks that anyone can point at their own training code, from pytest, a notebook or a rank.

Importing this package imports no torch; each check's own module is imported when it runs.
"""

from __future__ import annotations

from pytest_gputrain.checks.context import CheckContext
from pytest_gputrain.checks.parametrize import parametrize_with_checks
from pytest_gputrain.checks.registry import all_check_ids, get_check
from pytest_gputrain.checks.result import CheckResult
from pytest_gputrain.checks.runner import run_checks

__all__ = [
    "CheckContext",
    "CheckResult",
    "all_check_ids",
    "get_check",
    "parametrize_with_checks",
    "run_checks",
]
