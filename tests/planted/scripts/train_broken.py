"""The training script with one thing broken: what ``PLANTED_TRAIN`` names. The shipped tests have to notice each.

Used by ``tests/checks/test_auto_batch.py``, in the place of ``reference/train.py``.
"""

from __future__ import annotations

import dataclasses
import os
import sys
from collections.abc import Callable
from typing import Any

from pytest_gputrain.reference import train, train_batch, train_case

discover: Callable[..., int] = train_batch.discover_batch_size


def one_too_many(**asked: Any) -> int:
    return discover(**asked) + 1


def one_too_few(**asked: Any) -> int:
    return discover(**asked) - 1


def smallest(**asked: Any) -> int:
    discover(**asked)
    return 1


def each_rank_its_own(**asked: Any) -> int:
    return discover(**asked) - int(os.environ["RANK"])


def no_answer_for_others(**asked: Any) -> int:
    """Every rank looks for itself, and none waits for the first."""
    return discover(**{**asked, "ddp_rank": 0, "ddp_world_size": 1})


def override_ignored(**asked: Any) -> int:
    return discover(**{**asked, "override": None})


def never_from_the_cache(**asked: Any) -> int:
    return discover(**{**asked, "use_cache": False})
