"""Is what ``compile`` gives the model that it was given? Weights, their types, buffers, and the mode."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from pytest_gputrain.checks.result import CheckFailed
from pytest_gputrain.trace.names import canonical_name, inner_model, named_buffers, named_parameters

if TYPE_CHECKING:
    from pytest_gputrain.checks.compile_eager import Baseline
    from pytest_gputrain.checks.compile_sides import Side, Tensors

_SHOWN = 4


def same_start(baseline: Baseline, side: Side) -> list[str]:
    """Notes on what is odd and harmless. Raises CheckFailed where weights or buffers are others."""
    for what, mine, theirs in (
        ("parameters", baseline.start.parameters, named_parameters(side.bare)),
        ("buffers", baseline.start.buffers, named_buffers(side.bare)),
    ):
        if problem := _other(mine, theirs):
            number = f"{len(problem)} of {len(mine)} {what}"
            raise CheckFailed(
                f"compile() gives a model with other {'weights' if what == 'parameters' else what}: {number} "
                "are "
                f"not those of the model it was given: {', '.join(problem[:_SHOWN])}"
                f"{', …' if len(problem) > _SHOWN else ''}\n  likely: it compiles a new model, or casts or "
                "initialises the one that it is given; two different models cannot be compared",
                {"other": problem},
            )
    mode = mode_in_words(baseline, side)
    return [mode] if mode else []


def mode_in_words(baseline: Baseline, side: Side) -> str | None:
    """One line where modules are in another mode than the eager model's."""
    wanted = _modes(baseline.side.bare)
    found = _modes(side.bare)
    if isinstance(side.run, torch.nn.Module) and side.run is not side.bare:
        found = {**found, **({} if side.run.training == side.bare.training else {"": side.run.training})}
    other = [path for path, training in wanted.items() if found.get(path, training) != training]
    if not other:
        return None
    mode = "evaluation" if wanted[other[0]] else "training"
    return f"compile() leaves {len(other)} of {len(wanted)} modules in {mode} mode, and eager's are not"


def _modes(model: Any) -> dict[str, bool]:
    return {canonical_name(path): module.training for path, module in inner_model(model).named_modules()}


def _other(mine: Tensors, theirs: Tensors) -> list[str]:
    """Names, with what is other about each."""
    found = []
    for name in {**mine, **theirs}:
        one, other = mine.get(name), theirs.get(name)
        if one is None or other is None:
            found.append(f"{name} ({'new' if one is None else 'gone'})")
        elif one.shape != other.shape or one.dtype != other.dtype:
            found.append(f"{name} ({_kind(other)}, not {_kind(one)})")
        elif not torch.equal(one, other.detach().to(one.device)):
            found.append(name)
    return found


def _kind(tensor: Any) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)}"
