"""Who makes the batches of a stream: the collate function of the loader, or the stream itself."""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pytest_gputrain.case import TrainingCase


@contextlib.contextmanager
def watched_loaders() -> Iterator[list[Any]]:
    """The loaders whose iteration begins inside, wherever they are made."""
    from torch.utils.data import DataLoader

    found: list[Any] = []
    plain = DataLoader.__iter__

    def iterate(loader: Any) -> Any:
        found.append(loader)
        return plain(loader)

    DataLoader.__iter__ = iterate  # type: ignore[method-assign]
    try:
        yield found
    finally:
        DataLoader.__iter__ = plain  # type: ignore[method-assign]


def who_makes(case: TrainingCase, loaders: list[Any]) -> str:
    """``pad_to_longest (sft.py:88)``, for a message."""
    from torch.utils.data import default_collate

    for loader in loaders:
        if loader.collate_fn is not default_collate and loader.batch_size is not None:
            return f"collate function {named(loader.collate_fn)}"
    if loaders:
        return f"default_collate, of what {named(type(loaders[0].dataset))} gives"
    if case.has_own_batches:
        return f"batches(), {named(case.batches)}"
    return f"batch(), {named(case.batch)}"


def named(function: Any) -> str:
    """Its name, and file and line where Python knows them."""
    while isinstance(function, functools.partial):
        function = function.func
    function = inspect.unwrap(function) if callable(function) else function
    where = function if inspect.isroutine(function) or isinstance(function, type) else type(function)
    name = getattr(where, "__qualname__", type(function).__name__).replace("<locals>.", "")
    try:
        file, (_, line) = inspect.getsourcefile(where), inspect.getsourcelines(where)
    except (TypeError, OSError):
        return name
    return f"{name} ({Path(file or '?').name}:{line})"
