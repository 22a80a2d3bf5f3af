"""Batches are any nesting of containers around tensors; these walk them without knowing their classes.

Covers dicts and other mutable mappings (Hugging Face ``BatchEncoding``), lists, tuples, named tuples,
dataclasses and plain objects that keep tensors in their attributes. Does not cover objects with
``__slots__`` or tensors held by C extensions: those are leaves, passed on as they are.
"""

from __future__ import annotations

import copy
import dataclasses
import itertools
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from typing import Any

Leaf = tuple[str, Any]


def is_tensor(value: object) -> bool:
    import torch

    return isinstance(value, torch.Tensor)


def map_tensors(function: Callable[[Any], Any], tree: Any) -> Any:
    """The same nesting with ``function`` applied to every tensor; everything else is kept."""
    if is_tensor(tree):
        return function(tree)
    if isinstance(tree, MutableMapping):
        mapped = copy.copy(tree)
        for key, value in tree.items():
            mapped[key] = map_tensors(function, value)
        return mapped
    if isinstance(tree, tuple):
        items = [map_tensors(function, item) for item in tree]
        return type(tree)(*items) if hasattr(tree, "_fields") else type(tree)(items)
    if isinstance(tree, list):
        return type(tree)(map_tensors(function, item) for item in tree)
    return _map_attributes(function, tree) if _holds_tensors(tree) else tree


def _map_attributes(function: Callable[[Any], Any], tree: Any) -> Any:
    mapped = copy.copy(tree)
    for name, value in vars(tree).items():
        # frozen dataclasses refuse plain setattr
        object.__setattr__(mapped, name, map_tensors(function, value))
    return mapped


def _holds_tensors(value: Any) -> bool:
    """Whether this is a plain object whose attributes lead to a tensor."""
    if isinstance(value, type) or callable(value) or not hasattr(value, "__dict__"):
        return False
    if dataclasses.is_dataclass(value):
        return True
    return any(is_tensor(item) for item in vars(value).values())


def leaves(tree: Any, path: str = "") -> Iterator[Leaf]:
    """``(path, leaf)`` for every tensor and every other value, in a stable order."""
    if is_tensor(tree):
        yield path, tree
    elif isinstance(tree, Mapping):
        for key in tree:
            yield from leaves(tree[key], f"{path}[{key!r}]")
    elif isinstance(tree, tuple | list):
        for index, item in enumerate(tree):
            yield from leaves(item, f"{path}[{index}]")
    elif _holds_tensors(tree):
        for name, value in vars(tree).items():
            yield from leaves(value, f"{path}.{name}")
    else:
        yield path, tree


def tensors(tree: Any) -> list[Any]:
    """Every tensor of the nesting, in a stable order."""
    return [leaf for _, leaf in leaves(tree) if is_tensor(leaf)]


def batch_length(tree: Any) -> int | None:
    """Size of dimension 0 of the first tensor that has one; None when no tensor has."""
    return next((int(tensor.shape[0]) for tensor in tensors(tree) if tensor.dim() > 0), None)


def to_device(tree: Any, device: Any) -> Any:
    """The nesting with every tensor on ``device``."""
    return map_tensors(lambda tensor: tensor.to(device), tree)


def chunk(tree: Any, parts: int) -> list[Any]:
    """Cut every tensor on dimension 0 into ``parts`` (sizes differ by at most one); scalars are repeated.

    Raises ValueError when there is nothing to cut, fewer samples than parts, or tensors that
    disagree on dimension 0.
    """
    length = batch_length(tree)
    if parts < 1:
        raise ValueError(f"cannot split a batch into {parts} parts; give 1 or more")
    if parts == 1:
        return [tree]
    if length is None:
        raise ValueError("cannot split a batch without tensors; give the case a split(batch, n)")
    if parts > length:
        raise ValueError(f"cannot split a batch of {length} into {parts} parts; {parts} > {length}")
    sizes = {int(tensor.shape[0]) for tensor in tensors(tree) if tensor.dim() > 0}
    if len(sizes) > 1:
        raise ValueError(
            f"cannot split on dimension 0: the batch's tensors disagree there ({sorted(sizes)}); "
            "give the case a split(batch, n)"
        )
    bounds = [length * part // parts for part in range(parts + 1)]
    return [_rows(tree, start, stop) for start, stop in itertools.pairwise(bounds)]


def _rows(tree: Any, start: int, stop: int) -> Any:
    return map_tensors(lambda tensor: tensor[start:stop] if tensor.dim() > 0 else tensor, tree)


def join(trees: list[Any]) -> Any:
    """One batch from several, tensors joined on dimension 0; raises when their shapes do not allow it."""
    import torch

    columns = [iter(tensors(tree)) for tree in trees]

    def joined(tensor: Any) -> Any:
        parts = [next(column) for column in columns]
        return torch.cat(parts) if tensor.dim() > 0 else tensor

    return map_tensors(joined, trees[0])
