"""Which module got which style, learnt while ``parallelize`` runs: a function says nothing of its plan."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.distributed.tensor.parallel import ParallelStyle


@dataclass(frozen=True)
class Applied:
    """A style as torch's ``parallelize_module``, or a plan's own code, gave it to a module of this mesh."""

    module: nn.Module
    style: Any
    mesh: Any


@contextlib.contextmanager
def learning() -> Iterator[list[Applied]]:
    """In it every style that is applied is added to the list, the outermost where one calls another.

    Not seen: classes of styles that are made in it, and styles that are no ``ParallelStyle`` (transformers').
    """
    applied: list[Applied] = []
    within: list[Any] = []
    kept = {kind: kind.__dict__["_apply"] for kind in _kinds(ParallelStyle) if "_apply" in kind.__dict__}
    for kind, original in kept.items():
        kind._apply = _recording(original, applied, within)
    try:
        yield applied
    finally:
        for kind, original in kept.items():
            kind._apply = original


def _kinds(kind: type[Any]) -> Iterator[type[Any]]:
    for below in kind.__subclasses__():
        yield below
        yield from _kinds(below)


def _recording(original: Any, applied: list[Applied], within: list[Any]) -> Any:
    def _apply(self: Any, module: nn.Module, device_mesh: Any) -> Any:
        within.append(self)
        try:
            result = original(self, module, device_mesh)
        finally:
            within.pop()
        if not within:
            applied.append(Applied(result if isinstance(result, nn.Module) else module, self, device_mesh))
        return result

    return _apply
