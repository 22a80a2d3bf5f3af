"""Which module got which style, learnt while ``parallelize`` runs: a function says nothing of its plan."""

from __future__ import annotations

import contextlib
import difflib
import re
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor.parallel import ParallelStyle, RowwiseParallel

from pytest_gputrain.tensor_parallel.golden_model import ComparisonError

_SKIPPED = re.compile(r"could not be resolved: no submodule matching token '(?P<name>[^']*)'")


@dataclass(frozen=True)
class Applied:
    """A style as torch's ``parallelize_module``, or a plan's own code, gave it to a module of this mesh."""

    module: nn.Module
    style: Any
    mesh: Any


@contextlib.contextmanager
def learning(names: Mapping[int, str]) -> Iterator[list[Applied]]:
    """In it every style that is applied is added to the list, the outermost where one calls another.

    names: of modules, by id, for the error of a style that does not take its module.

    Not seen: classes of styles that are made in it, and styles that are no ``ParallelStyle`` (transformers').
    """
    applied: list[Applied] = []
    within: list[Any] = []
    kept = {kind: kind.__dict__["_apply"] for kind in _kinds(ParallelStyle) if "_apply" in kind.__dict__}
    for kind, original in kept.items():
        kind._apply = _recording(original, applied, within, names)
    try:
        yield applied
    finally:
        for kind, original in kept.items():
            kind._apply = original


@contextlib.contextmanager
def skipping() -> Iterator[list[str]]:
    """In it, the list gets each name that torch's ``parallelize_module`` skips, because no module has it."""
    skipped: list[str] = []
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        yield skipped
    for one in told:
        found = _SKIPPED.search(str(one.message))
        if found:
            skipped.append(found["name"])
        else:
            warnings.warn_explicit(one.message, one.category, one.filename, one.lineno)


def not_there(skipped: list[str], model: nn.Module) -> str | None:
    """The first skipped name that no module at all has in its path; others may be those of some layers only.

    model: in one piece.
    """
    paths = [name for name, _ in model.named_modules() if name]
    known = list(dict.fromkeys(part for path in paths for part in path.split(".")))
    name = next((one for one in skipped if not any(fnmatchcase(part, one) for part in known)), None)
    if name is None:
        return None
    words = [part for part in known if not part.isdigit()]
    near = difflib.get_close_matches(name, words, n=3, cutoff=0.6)
    shown = [next(path for path in paths if part in path.split(".")) for part in near]
    way_out = f"near: {', '.join(shown)}" if near else f"its names are {', '.join(words[:12])}"
    return (
        f"the plan of parallelize names {name!r}, and no module of the model is called so: torch only warns, "
        f"and leaves it whole; {way_out}"
    )


def _kinds(kind: type[Any]) -> Iterator[type[Any]]:
    for below in kind.__subclasses__():
        yield below
        yield from _kinds(below)


def _recording(original: Any, applied: list[Applied], within: list[Any], names: Mapping[int, str]) -> Any:
    def _apply(self: Any, module: nn.Module, device_mesh: Any) -> Any:
        within.append(self)
        try:
            result = original(self, module, device_mesh)
        except NotImplementedError as error:
            what = f"{names.get(id(module), 'a module')!r}, a {type(module).__name__}"
            raise ComparisonError(
                f"the plan of parallelize gives {what}, the style {type(self).__name__}: {error}"
            ) from None
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
