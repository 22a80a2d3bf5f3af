"""What a loop saves, as the tensors of a model: wherever they lie in the dictionary."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from pytest_gputrain.case import pytree
from pytest_gputrain.trace.names import canonical_name

Tensors = dict[str, Any]
PREFIX = "_orig_mod."
DEPTH = 3


def saved_tensors(state: Any, model: Any) -> Tensors:
    """Of all dictionaries in it, the one that has most of the model's tensors; empty where none has any.

    A checkpoint holds an optimizer's state beside the model's ({"model": ..., "optimizer": ..., "step": 3}).
    """
    expected = {bare(name) for name in model.state_dict()}
    best, most = {}, 0
    for entries in _dictionaries(state, DEPTH):
        known = sum(bare(name) in expected for name in entries)
        if known > most:
            best, most = entries, known
    return best


def prefixed(state: Any) -> list[str]:
    """Every key, in whichever part of what is saved, that has torch.compile's prefix."""
    return [key for key in every_name(state) if PREFIX in key]


def every_name(state: Any) -> list[str]:
    """Of every tensor, in whichever part of what is saved."""
    return [key for entries in _dictionaries(state, DEPTH) for key in entries]


def missing_and_unexpected(model: Any, tensors: Tensors) -> tuple[list[str], list[str]]:
    """The model's keys that are not saved, and the saved ones that it does not have."""
    expected = model.state_dict()
    return [key for key in expected if key not in tensors], [key for key in tensors if key not in expected]


def differing(tensors: Tensors, model: Any) -> list[str]:
    """Names whose tensor is not the model's, in the type in which it is saved."""
    import torch

    own: Tensors = {bare(name): value for name, value in model.state_dict().items()}

    def differs(value: Any, mine: Any) -> bool:
        return not torch.equal(mine.to(value.device, value.dtype), value)

    known = {name: own[bare(name)] for name in tensors if bare(name) in own}
    return [
        name
        for name, mine in known.items()
        if pytree.is_tensor(tensors[name]) and differs(tensors[name], mine)
    ]


def round_as_saved(tensors: Tensors, model: Any) -> None:
    """The model's weights rounded to the types in which they are saved: a checkpoint in half precision is one
    of the same model, and its outputs are compared with what these weights give.
    """
    import torch

    own: Tensors = {bare(name): value for name, value in model.state_dict().items()}
    with torch.no_grad():
        for name, value in tensors.items():
            mine: Any = own.get(bare(name))
            if pytree.is_tensor(value) and pytree.is_tensor(mine) and mine.dtype != value.dtype:
                mine.copy_(mine.to(value.dtype))


def bare(name: str) -> str:
    """The name without what torch.compile and data parallelism put in front."""
    return canonical_name(name).removeprefix("module.")


def _dictionaries(state: Any, depth: int) -> Iterator[Tensors]:
    """Every mapping from names to tensors in it, the outermost first; with a module's extra state."""
    if not isinstance(state, Mapping):
        return
    entries = {
        key: value
        for key, value in state.items()
        if isinstance(key, str) and (pytree.is_tensor(value) or key.endswith("_extra_state"))
    }
    if entries:
        yield entries
    if depth:
        for value in state.values():
            yield from _dictionaries(value, depth - 1)
