"""What a case's functions give back, looked at where it is used: one clear line instead of torch's, or none.

Only what is wrong in any case is refused. An ``optimizer`` may return a tuple, a dict or nothing where the
case's own ``step`` knows what to do with it: the default step is what needs an optimizer.
"""

from __future__ import annotations

import functools
import inspect
import os
from collections.abc import Iterator
from typing import Any, NoReturn

LOCATION = "__gputrain_location__"
"""Attribute of an exception that knows better than its traceback where the fault is."""

SHOWN = 80


def refuse(function: Any, what: str, given: str, legal: str) -> NoReturn:
    """Raises ValueError: "the case's loss(model, batch) returned None; legal is …", at the line of it."""
    error = ValueError(f"the case's {what} returned {given}; legal is {legal}")
    setattr(error, LOCATION, where(function))
    raise error


def described(value: Any) -> str:
    """``a tuple (SGD, LambdaLR)``, ``None``, ``a tensor of shape (4,)``: what was given, never at length."""
    import torch

    if isinstance(value, torch.Tensor):
        return f"a tensor of shape {tuple(value.shape)}"
    if isinstance(value, list | tuple):
        kinds = ", ".join(type(item).__name__ for item in value[:5]) + (", ..." if len(value) > 5 else "")
        return f"a {type(value).__name__} ({kinds})"
    if isinstance(value, type):
        return f"the class {value.__name__}"
    if value is None or isinstance(value, bool | int | float | str):
        return f"{value!r:.{SHOWN}}"
    return f"a {type(value).__name__}"


def checked_optimizer(function: Any, optimizer: Any) -> None:
    """Raises ValueError for what the default step cannot step with."""
    methods = ("step", "zero_grad")
    if not isinstance(optimizer, type) and all(callable(getattr(optimizer, name, None)) for name in methods):
        return
    refuse(
        function,
        "optimizer(model)",
        described(optimizer),
        "one object with step() and zero_grad(), as torch's optimizers; a loop with more (a scheduler, "
        "several optimizers) gives its own step(model, optimizer, micro_batches)",
    )


def checked_loss(function: Any, loss: Any) -> Any:
    """The loss, a scalar that leads to a gradient. Raises ValueError: torch would name a line of its own."""
    import torch

    what = "loss(model, batch)"
    if not isinstance(loss, torch.Tensor) or loss.numel() != 1:
        way_out = ", such as its .loss" if isinstance(getattr(loss, "loss", None), torch.Tensor) else ""
        refuse(function, what, described(loss), f"a scalar tensor{way_out}")
    if not loss.requires_grad:
        refuse(
            function,
            what,
            f"a tensor of {loss.dtype} that leads to no parameter",
            "a scalar tensor that autograd knows the way back from: not detached, not made under no_grad or "
            "by torch.tensor(), and no count",
        )
    return loss


def checked_count(function: Any, count: Any) -> float:
    """What ``num_targets`` gave, as a number. Raises ValueError for what is none."""
    try:
        return float(count)
    except (TypeError, ValueError, RuntimeError):
        refuse(
            function, "num_targets(batch)", described(count), "the number of targets that count in the loss"
        )


def wrapped_by(case: Any, model: Any) -> Any:
    """``case.wrap(model)``. Raises ValueError for what holds no parameters or cannot be called."""
    made = case.wrap(model)
    if not callable(made) or not callable(getattr(made, "parameters", None)) or isinstance(made, type):
        refuse(
            case.wrap, "wrap(model)", described(made), "the data-parallel model, which is what a step calls"
        )
    return made


def stream_of(case: Any) -> Iterator[Any]:
    """``case.batches()``, iterated from its beginning. Raises ValueError for what cannot be."""
    given = case.batches()
    try:
        return iter(given)
    except TypeError:
        refuse(
            case.batches,
            "batches()",
            described(given),
            "an iterable of batches (a DataLoader, a generator, a list)",
        )


def where(function: Any) -> str | None:
    """``my_cases.py:12 in loss``, relative to the working folder; None for what Python does not know."""
    resolve = getattr(function, "resolve", None)
    function = resolve() if callable(resolve) else function
    while isinstance(function, functools.partial):
        function = function.func
    function = inspect.unwrap(function) if callable(function) else function
    place = function if inspect.isroutine(function) or isinstance(function, type) else type(function)
    try:
        file, (_, line) = inspect.getsourcefile(place), inspect.getsourcelines(place)
        base = os.getcwd() + os.sep
    except (TypeError, OSError):
        return None
    return f"{(file or '?').removeprefix(base)}:{line} in {getattr(place, '__name__', '?')}"
