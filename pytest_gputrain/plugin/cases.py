"""The training cases of a session: those of ``--gputrain-case``, or the embedded reference models."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from pytest_gputrain.plugin.settings import settings_of

if TYPE_CHECKING:
    from pytest_gputrain.case import TrainingCase

_CASES = pytest.StashKey["list[TrainingCase]"]()
_REFUSED = pytest.StashKey[str]()


def cases_of(config: pytest.Config) -> list[TrainingCase]:
    """Return the session's cases, loaded when first asked for: a session without shipped checks loads none.

    Meant for ``pytest_generate_tests``. Where a case cannot be loaded the list is empty and the session ends
    with a usage error once it has collected: raised here, pytest would take it for a broken test module.
    """
    if _CASES not in config.stash:
        config.stash[_CASES] = _load(config)
    return config.stash[_CASES]


def _load(config: pytest.Config) -> list[TrainingCase]:
    from pytest_gputrain.case import CaseError, load_case
    from pytest_gputrain.checks.preflight import check_names
    from pytest_gputrain.reference import reference_cases

    settings = settings_of(config)
    if not settings.cases:
        return reference_cases()
    try:
        cases = [case for spec in settings.cases for case in load_case(spec)]
        for case in cases:
            check_names(case)
    except CaseError as error:
        config.stash[_REFUSED] = f"--gputrain-case (from {settings.origins['cases']}): {error}"
        return []
    return cases


def raise_refused(config: pytest.Config) -> None:
    """Raise ``pytest.UsageError`` when a case could not be loaded."""
    if message := config.stash.get(_REFUSED, ""):
        raise pytest.UsageError(message)
