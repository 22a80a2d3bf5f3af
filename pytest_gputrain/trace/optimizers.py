"""Sees every optimizer step, whoever makes it, through torch's public global hooks.

An optimizer that is no ``torch.optim.Optimizer`` is seen when its own ``step`` is called, unless torch
optimizers inside it step then: those know their parameters. Does not see parameters that are updated by
hand, outside any ``step``.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

# The parameters an optimizer holds; None: it does not say.
Held = list[Any] | None
Callback = Callable[[Any, Held], None]


def _ignore(optimizer: Any, held: Held) -> None:
    return None


class OptimizerWatch:
    """Context manager: ``before`` and ``after`` are called around every outermost optimizer step.

    A step within a step (a wrapper that calls the optimizer it wraps) is part of the outer one; one that a
    loss scaler lets a fused optimizer skip is none.
    """

    def __init__(self, optimizer: Any, before: Callback = _ignore, after: Callback = _ignore) -> None:
        self.optimizer = optimizer
        self.before = before
        self.after = after
        self.steps = 0
        self._depth = 0
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> OptimizerWatch:
        from torch.optim import Optimizer
        from torch.optim import optimizer as hooks

        pre = hooks.register_optimizer_step_pre_hook(self._before_torch)
        self._stack.callback(pre.remove)
        post = hooks.register_optimizer_step_post_hook(self._after_torch)
        self._stack.callback(post.remove)
        if not isinstance(self.optimizer, Optimizer) and callable(getattr(self.optimizer, "step", None)):
            self._stack.enter_context(self._watch_foreign())
        return self

    def __exit__(self, *exception: object) -> None:
        self._stack.close()

    def _before_torch(self, optimizer: Any, args: Any, kwargs: Any) -> None:
        self._depth += 1
        if self._depth == 1 and not _is_skipped(optimizer):
            self.steps += 1
            self.before(optimizer, parameters_of(optimizer))

    def _after_torch(self, optimizer: Any, args: Any, kwargs: Any) -> None:
        self._depth -= 1
        if self._depth == 0 and not _is_skipped(optimizer):
            self.after(optimizer, parameters_of(optimizer))

    @contextlib.contextmanager
    def _watch_foreign(self) -> Iterator[None]:
        optimizer, original = self.optimizer, self.optimizer.step
        had_own = "step" in getattr(optimizer, "__dict__", {})

        def step(*args: Any, **kwargs: Any) -> Any:
            steps_before = self.steps
            self.before(optimizer, None)
            outcome = original(*args, **kwargs)
            if self.steps == steps_before:
                self.steps += 1
            self.after(optimizer, None)
            return outcome

        try:
            optimizer.step = step
        except AttributeError:  # __slots__: then only what it holds is seen
            yield
            return
        try:
            yield
        finally:
            if had_own:
                optimizer.step = original
            else:
                del optimizer.step


def _is_skipped(optimizer: Any) -> bool:
    """GradScaler calls a fused optimizer even after an overflow, and tells it here to do nothing."""
    found = getattr(optimizer, "found_inf", None)
    return found is not None and bool(found)


def parameters_of(optimizer: Any) -> list[Any]:
    """Every parameter in the groups of one optimizer, duplicates included."""
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def optimizers_in(optimizer: Any, depth: int = 3) -> list[Any]:
    """The torch-like optimizers in whatever a case calls its optimizer: itself, a list, a wrapper of some."""
    if hasattr(optimizer, "param_groups"):
        return [optimizer]
    if depth == 0:
        return []
    if isinstance(optimizer, dict):
        items = list(optimizer.values())
    elif isinstance(optimizer, list | tuple):
        items = list(optimizer)
    else:
        items = list(getattr(optimizer, "__dict__", {}).values())
    found = [inner for item in items for inner in optimizers_in(item, depth - 1)]
    return list({id(inner): inner for inner in found}.values())
