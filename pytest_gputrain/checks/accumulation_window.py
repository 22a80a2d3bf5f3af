"""One window seen from outside: what a case's ``step`` does from its first micro-batch to its last.

Gradients as the optimizer gets them (inside a closure: after its first call), steps of optimizers and
schedulers, clipping, gradients that vanish between two backward passes. ``factor`` scales every gradient
at its root: tiny, so that no threshold of any clipping is reached; huge, so that every one is.

Does not see gradients that never pass through ``torch.autograd.backward``, nor a schedule that is kept
outside the optimizer's groups until it acts.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from pytest_gputrain.checks.accumulation_seams import patched_clipping, patched_scaler, patched_schedulers
from pytest_gputrain.trace.digest import whole
from pytest_gputrain.trace.optimizers import Held, OptimizerWatch, optimizers_in, parameters_of
from pytest_gputrain.trace.steps import patched_backward

Gradients = dict[str, Any]  # name -> dense copy, or None


class Handed(list[Any]):
    """The micro-batches as the step gets them; remembers whether it ever asked for more than the first."""

    def __init__(self, items: Any) -> None:
        super().__init__(items)
        self.asked = False

    def __iter__(self) -> Iterator[Any]:
        self.asked = True
        return super().__iter__()

    def __len__(self) -> int:
        self.asked = True
        return super().__len__()

    def __getitem__(self, key: Any) -> Any:
        self.asked = self.asked or key != 0
        return super().__getitem__(key)


@dataclass
class Window:
    """gradients: at each parameter's first optimizer step; after the last backward where none came.

    steps: optimizer steps by parameter; settings: every number in the optimizer's groups at each step;
    scaled_clips: clippings of gradients that a loss scaler had not unscaled; lost: by backward pass, how many
    parameters' gradients were gone before the next; left: parameters whose step used what the window before
    had left; loss: what the step returned, if it is a number; asked: whether it looked at more than the first
    micro-batch; states: the random state before each forward pass of the model.
    """

    gradients: Gradients = field(default_factory=dict)
    steps: dict[str, int] = field(default_factory=dict)
    optimizer_steps: int = 0
    settings: list[list[dict[str, float]]] = field(default_factory=list)
    scheduler_steps: int = 0
    clips: int = 0
    scaled_clips: int = 0
    backwards: int = 0
    lost: dict[int, int] = field(default_factory=dict)
    left: list[str] = field(default_factory=list)
    loss: float | None = None
    asked: bool = True
    states: list[dict[str, Any]] = field(default_factory=list)

    @property
    def most_steps(self) -> int:
        return max(self.steps.values(), default=0)

    @property
    def is_empty(self) -> bool:
        return all(gradient is None or not bool(gradient.any()) for gradient in self.gradients.values())


class WindowWatch:
    """``with WindowWatch(parameters, optimizer) as window: step(...)``."""

    def __init__(self, parameters: dict[str, Any], optimizer: Any, factor: float = 1.0) -> None:
        self.parameters, self.optimizer, self.factor = parameters, optimizer, factor
        self.window = Window()
        self._names = {id(parameter): name for name, parameter in parameters.items()}
        self._latest: Gradients = {}
        self._depth = 0
        self._scheduling = 0
        self._is_scaled = False
        self._present: set[str] = set()
        self._left: set[str] = set()
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> Window:
        from torch.optim import optimizer as hooks

        self._left = self._nonzero()
        enter = self._stack.enter_context
        enter(patched_backward(self._backward))
        enter(patched_clipping(self._clip))
        enter(patched_schedulers(self._schedule))
        enter(patched_scaler(self._scale))
        enter(OptimizerWatch(self.optimizer, self._before_update, self._after_update))
        self._stack.callback(hooks.register_optimizer_step_pre_hook(self._watch_closure).remove)
        return self.window

    def __exit__(self, *exception: object) -> None:
        self._stack.close()
        for name, gradient in self._latest.items():
            self.window.gradients.setdefault(name, gradient)

    def _backward(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if self._depth:  # of a reentrant checkpoint
            return original(*args, **kwargs)
        present = self._nonzero()
        if gone := self._present - present:
            self.window.lost[self.window.backwards - 1] = len(gone)
        self._left &= present
        self._depth += 1
        try:
            outcome = original(*_scaled(args, kwargs, self.factor), **kwargs)
        finally:
            self._depth -= 1
        self.window.backwards += 1
        self._present = self._nonzero()
        self._latest = self._copies(self.parameters)
        return outcome

    def _nonzero(self) -> set[str]:
        return {
            name
            for name, parameter in self.parameters.items()
            if parameter.grad is not None and bool(whole(parameter.grad).any())
        }

    def _copies(self, names: Any) -> Gradients:
        return {name: dense(self.parameters[name].grad) for name in names}

    def _before_update(self, optimizer: Any, held: Held) -> None:
        names = self._held(held)
        for name, gradient in self._copies(names).items():
            self.window.gradients.setdefault(name, gradient)
            self.window.steps[name] = self.window.steps.get(name, 0) + 1
        self._judge_left(names)
        self.window.settings.append(settings_of(self.optimizer))

    def _judge_left(self, names: list[str]) -> None:
        self.window.left += sorted(self._left & self._nonzero() & set(names))
        self._left -= set(names)

    def _after_update(self, optimizer: Any, held: Held) -> None:
        self.window.optimizer_steps += 1
        self._present = set()

    def _held(self, held: Held) -> list[str]:
        if held is None:
            # A wrapper: what it holds has been, or will be, told by the optimizers inside.
            return [] if optimizers_in(self.optimizer) else list(self.parameters)
        return list(dict.fromkeys(self._names[id(one)] for one in held if id(one) in self._names))

    def _watch_closure(self, optimizer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The gradients that count are those after the closure's first call."""
        closure = kwargs.get("closure") or (args[1] if len(args) > 1 else None)
        if not callable(closure):
            return None
        names, calls = self._held(parameters_of(optimizer)), 0
        self._left |= set(self.window.left) & set(names)  # it may zero them itself
        self.window.left = [name for name in self.window.left if name not in names]

        @functools.wraps(closure)
        def watched(*inner: Any, **keywords: Any) -> Any:
            nonlocal calls
            value = closure(*inner, **keywords)
            if not calls:
                self.window.gradients.update(self._copies(names))
                self._judge_left(names)
            calls += 1
            return value

        if "closure" in kwargs:
            return args, {**kwargs, "closure": watched}
        return (args[0], watched, *args[2:]), kwargs

    def _clip(self, limit: Any) -> None:
        if math.isfinite(float(limit)):  # infinite: somebody wants to know the norm
            self.window.clips += 1
            self.window.scaled_clips += self._is_scaled

    def _scale(self, is_scaled: bool) -> None:
        self._is_scaled = is_scaled

    def _schedule(self, original: Callable[..., Any], counts: bool, *args: Any, **kwargs: Any) -> Any:
        self.window.scheduler_steps += counts and not self._scheduling
        self._scheduling += 1
        try:
            return original(*args, **kwargs)
        finally:
            self._scheduling -= 1


def dense(gradient: Any) -> Any:
    """A copy in a real type that sums lose no digits in; None stays None."""
    from pytest_gputrain.checks.averages import wide

    return None if gradient is None else wide(whole(gradient).detach()).clone()


def settings_of(optimizer: Any) -> list[dict[str, float]]:
    """Every number in the groups (rates, momenta, decays) of whatever the case calls its optimizer."""
    found = []
    for inner in optimizers_in(optimizer):
        for group in inner.param_groups:
            plain = {key: _number(value) for key, value in group.items() if key != "params"}
            found.append({key: value for key, value in plain.items() if value is not None})
    return found


def _number(value: Any) -> float | None:
    import torch

    if isinstance(value, torch.Tensor):
        return float(value) if value.numel() == 1 else None
    return float(value) if isinstance(value, int | float) else None


def _scaled(args: tuple[Any, ...], kwargs: dict[str, Any], factor: float) -> tuple[Any, ...]:
    """The arguments of ``torch.autograd.backward`` with its roots' gradients times ``factor``."""
    import torch

    if factor == 1.0 or not args:
        return args
    roots = [args[0]] if isinstance(args[0], torch.Tensor) else list(args[0])
    given = args[1] if len(args) > 1 else kwargs.pop("grad_tensors", None)
    seeds = [given] if given is None or isinstance(given, torch.Tensor) else list(given)
    seeds = seeds * len(roots) if seeds == [None] else seeds
    scaled = [
        torch.full_like(root, factor) if seed is None else seed * factor
        for root, seed in zip(roots, seeds, strict=True)
    ]
    return (roots, scaled, *args[2:])
