"""What switches change in a script's model before it runs: checkpointed layers, one branch alone.

A module takes part in branch forcing by a method ``force_branch(name)``, and says by an attribute
``branches`` which names are legal.
"""

from __future__ import annotations

from typing import Any

from pytest_gputrain.trace.layers import branched_modules, layer_list
from pytest_gputrain.trace.sink import Sink
from pytest_gputrain.trace.switches import (
    FIND_UNUSED,
    FORCE_BRANCH,
    GC_RANGE,
    STATIC_GRAPH,
    SwitchError,
    Switches,
)


class Rewiring:
    """Applies the switches to each model that is met, and knows which of them have met nothing yet."""

    def __init__(self, switches: Switches, sink: Sink) -> None:
        self._switches, self._sink = switches, sink
        self.met: set[str] = set()

    @property
    def ddp_options(self) -> dict[str, Any]:
        """What is set in every DistributedDataParallel constructor."""
        said = {
            "static_graph": self._switches.static_graph,
            "find_unused_parameters": self._switches.find_unused,
        }
        return {name: True for name, on in said.items() if on}

    @property
    def unmet(self) -> list[str]:
        """Switches of the model that are set and have changed nothing yet."""
        said = {GC_RANGE: self._switches.layers, FORCE_BRANCH: self._switches.branch}
        return [name for name, value in said.items() if value is not None and name not in self.met]

    def rewire(self, model: Any) -> None:
        """Changes a model that has not run yet. Raises SwitchError for what it does not have."""
        layers, branch = self._switches.layers, self._switches.branch
        done = {
            GC_RANGE: None if layers is None else checkpoint_layers(model, layers),
            FORCE_BRANCH: None if branch is None else force_branch(model, branch),
        }
        self.met |= {name for name, line in done.items() if line}
        self._sink.write("rewiring", [line for line in done.values() if line])

    def require_effect(self) -> None:
        """Raises SwitchError for a switch that found nothing to change: a run without it proves nothing."""
        for name, what in ((GC_RANGE, "a list of layers"), (FORCE_BRANCH, "a method force_branch(name)")):
            if name in self.unmet:
                raise SwitchError(f"{name} is set, but no model that was trained has {what}; unset it")
        if self.ddp_options and "ddp" not in self.met:
            name = STATIC_GRAPH if self._switches.static_graph else FIND_UNUSED
            raise SwitchError(f"{name} is set, but no DistributedDataParallel was made; unset it")


def checkpoint_layers(model: Any, layers: tuple[int | None, int | None]) -> str | None:
    """Switches activation checkpointing on for a range of the model's layers, and says which.

    None where the model has no list of layers. Raises SwitchError when the range leaves it.
    """
    name, found = layer_list(model)
    if not found:
        return None
    start, end = layers[0] or 0, len(found) if layers[1] is None else layers[1]
    if start >= len(found) or end > len(found):
        asked = ":".join("" if bound is None else str(bound) for bound in layers)
        raise SwitchError(
            f"{GC_RANGE}={asked!r}: {type(model).__name__} has {len(found)} layers ({name}), "
            f"so the range must lie within 0:{len(found)}"
        )
    for layer in found[start:end]:
        layer.forward = _Checkpointed(layer.forward)
    return f"[GC-RANGE] {start}:{end} of {len(found)} layers ({name}) are checkpointed"


class _Checkpointed:
    """A layer's ``forward`` that recomputes its activations in backward.

    Not a closure: a copy of the model must call the copy's layer.
    """

    def __init__(self, forward: Any) -> None:
        self._forward = forward

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        import torch
        from torch.utils.checkpoint import checkpoint

        if not torch.is_grad_enabled():
            return self._forward(*args, **kwargs)
        return checkpoint(self._forward, *args, use_reentrant=False, **kwargs)


def force_branch(model: Any, branch: str) -> str | None:
    """Leaves only this branch of the model's branched modules, and says in which.

    None where the model has no such module. Raises SwitchError for a branch that they do not have.
    """
    branched = branched_modules(model)
    for name, module in branched.items():
        legal = [str(known) for known in getattr(module, "branches", [branch])]
        if branch not in legal:
            raise SwitchError(f"{FORCE_BRANCH}={branch!r}: {name} has the branches {', '.join(legal)}")
        module.force_branch(branch)
    if not branched:
        return None
    return f"[BRANCH] {branch} alone in {', '.join(branched)}"
