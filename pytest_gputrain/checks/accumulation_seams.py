"""Where torch clips, schedules and scales a loss: told to whoever watches a window, and left as it was."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any


@contextlib.contextmanager
def patched_clipping(told: Callable[[Any], None]) -> Iterator[None]:
    """``told(limit)`` at every clipping by torch; by norm however the function was imported."""
    import torch
    from torch.nn.utils import clip_grad

    places = [(clip_grad, name) for name in ("_clip_grads_with_norm_", "clip_grads_with_norm_")]
    places += [(clip_grad, "clip_grad_value_"), (torch.nn.utils, "clip_grad_value_")]
    with contextlib.ExitStack() as stack:
        for holder, name in places:
            if (original := getattr(holder, name, None)) is not None:
                stack.callback(setattr, holder, name, original)
                setattr(holder, name, _told(original, told))
        yield


def _told(original: Callable[..., Any], told: Callable[[Any], None]) -> Callable[..., Any]:
    @functools.wraps(original)
    def clip(*args: Any, **kwargs: Any) -> Any:
        limit = args[1] if len(args) > 1 else kwargs.get("max_norm", kwargs.get("clip_value", 0.0))
        told(limit)
        return original(*args, **kwargs)

    return clip


@contextlib.contextmanager
def patched_schedulers(around: Callable[..., Any]) -> Iterator[None]:
    """Every ``step`` of torch's schedulers and their subclasses, but for the first one of a new one."""
    from torch.optim.lr_scheduler import LRScheduler

    with contextlib.ExitStack() as stack:
        for kind in _family(LRScheduler):
            for name in ("step", "_initial_step"):
                if name in vars(kind):
                    original = vars(kind)[name]
                    stack.callback(setattr, kind, name, original)
                    setattr(kind, name, _around(original, around, name == "step"))
        yield


@contextlib.contextmanager
def patched_scaler(told: Callable[[bool], None]) -> Iterator[None]:
    """``told(True)`` when a loss scaler scales by anything but 1, ``told(False)`` when it unscales."""
    from torch.amp import GradScaler

    scale, unscale = GradScaler.scale, GradScaler.unscale_

    def scaling(self: Any, outputs: Any) -> Any:
        scaled = scale(self, outputs)
        told(self.get_scale() != 1.0)
        return scaled

    def unscaling(self: Any, optimizer: Any) -> Any:
        told(False)
        return unscale(self, optimizer)

    GradScaler.scale, GradScaler.unscale_ = scaling, unscaling  # type: ignore[method-assign]
    try:
        yield
    finally:
        GradScaler.scale, GradScaler.unscale_ = scale, unscale  # type: ignore[method-assign]


def _around(original: Callable[..., Any], around: Callable[..., Any], counts: bool) -> Callable[..., Any]:
    @functools.wraps(original)
    def step(*args: Any, **kwargs: Any) -> Any:
        return around(original, counts, *args, **kwargs)

    return step


def _family(kind: type) -> list[type]:
    children: list[type] = kind.__subclasses__()
    return [kind, *(each for child in children for each in _family(child))]
