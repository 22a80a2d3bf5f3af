"""Small models the checks run on when no case is given.

Importing this package, or the modules that hold the cases, imports no torch: a case names its functions
and they are looked up in the rank that calls them.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pytest_gputrain.case import TrainingCase


def reference_cases() -> list[TrainingCase]:
    """The embedded default: the tiny GPT, and tiny OPT where ``transformers`` is installed."""
    from pytest_gputrain.reference import gpt, opt

    return [gpt.case, opt.case] if find_spec("transformers") else [gpt.case]
