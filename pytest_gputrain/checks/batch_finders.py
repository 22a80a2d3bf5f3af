"""What looks for a batch size: the package's own, or anybody's, asked the same questions.

A finder is ``finder(case, *, model, optimizer, device, capacity, min_batch_size, max_batch_size,
global_batch_size, evaluates)`` and returns the size, or an object with ``.size``. ``model`` and ``optimizer``
are those that go on training afterwards: it may try on them and leave them as they were, or make its own from
the case. ``capacity``: bytes, all of which may be used. ``evaluates``: False where the case's loss cannot be
computed in evaluation mode. It may leave out of its arguments what it does not want.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from pytest_gputrain.case import TrainingCase
from pytest_gputrain.case.loading import LazyCallable

Finder = Callable[..., Any]
# find_batch takes a capacity as small as a test's for a unit forgotten. A power of two: nothing is rounded.
SCALE = 1024


def ours(case: TrainingCase, **question: Any) -> int:
    """``find_batch`` with all of the capacity."""
    from pytest_gputrain.batch.discovery import find_batch

    return find_batch(
        case,
        device=question["device"],
        capacity=question["capacity"] * SCALE,
        safety_margin=1 / SCALE,
        min_batch_size=question["min_batch_size"],
        max_batch_size=question["max_batch_size"],
        global_batch_size=question["global_batch_size"],
        eval_batch_factor=1 if question["evaluates"] else 0,
        **_in_place(question),
    ).size


def _in_place(question: dict[str, Any]) -> dict[str, Any]:
    """The model in training itself, where its optimizer is one that torch knows and no wrapper of several."""
    from torch.optim import Optimizer

    if not isinstance(question["optimizer"], Optimizer):
        return {}
    return {"model": question["model"], "optimizer": question["optimizer"]}


def ask(finder: Finder | str | None, case: TrainingCase, **question: Any) -> int:
    """The size that the finder gives, None being the package's own. Raises what the finder raises."""
    function = LazyCallable(finder, "finder").resolve() if isinstance(finder, str) else finder or ours
    found = function(case, **_wanted(function, question))
    return int(getattr(found, "size", found))


def name_of(finder: Finder | str | None) -> str:
    if finder is None:
        return "find_batch"
    return finder if isinstance(finder, str) else getattr(finder, "__name__", type(finder).__name__)


def _wanted(function: Finder, question: dict[str, Any]) -> dict[str, Any]:
    parameters = inspect.signature(function).parameters.values()
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        return question
    names = {parameter.name for parameter in parameters}
    return {name: value for name, value in question.items() if name in names}
