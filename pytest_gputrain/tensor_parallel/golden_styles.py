"""Which module got which style, learnt while ``parallelize`` runs: a function says nothing of its plan."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor.parallel import ParallelStyle, RowwiseParallel

from pytest_gputrain.tensor_parallel.golden_model import ComparisonError


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


def refuse_whole_inputs(applied: list[Applied], model: nn.Module) -> None:
    """Lets a row layer that is given all channels say so, before torch says that shapes do not fit.

    Raises ComparisonError, later, in such a call: columns and rows are swapped, or what comes is whole.
    """
    names = {id(module): name for name, module in model.named_modules()}
    for one in applied:
        if (
            isinstance(one.style, RowwiseParallel)
            and isinstance(one.module, nn.Linear)
            and one.style.input_layouts == (Shard(-1),)
            and one.mesh.size() > 1
        ):
            hook = _refusing(names.get(id(one.module), "a layer"), one.mesh.size())
            one.module.register_forward_pre_hook(hook, prepend=True)


def _refusing(name: str, size: int) -> Any:
    def hook(module: Any, args: Any) -> None:
        x, weight = (args[0] if args else None), module.weight
        if not isinstance(x, torch.Tensor) or isinstance(x, DTensor) or not isinstance(weight, DTensor):
            return
        whole = weight.shape[1]
        if x.shape[-1] == whole:
            raise ComparisonError(
                f"{name} is RowwiseParallel, which takes a rank's part of the input (of {whole} channels, "
                f"cut over {size} ranks), and is given all {whole}: are ColwiseParallel and RowwiseParallel "
                "swapped? Else give it input_layouts=Replicate()"
            )

    return hook
