"""Tokens at the borders of the vocabulary's parts: those that a comparison over ranks is about.

Of a vocabulary of 50,000 a batch has a few dozen tokens: hardly ever those where one rank's rows end and the
next one's begin, nor the one whose number within a part is that of the padding token.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import nn

from pytest_gputrain.tensor_parallel.golden_model import aliases
from pytest_gputrain.tensor_parallel.golden_pair import Pair
from pytest_gputrain.tensor_parallel.golden_world import is_dtensor
from pytest_gputrain.trace.names import canonical_name

Shapes = list[tuple[int, ...]]


class Borders:
    """In it, embeddings whose rows are cut over the ranks are asked for other rows than the batch says: those
    of the reference and of the parallel model alike.

    rows: by the embedding's name, those that are asked for, the first ones first where an input has not room
    for all. Empty where no embedding is cut so.
    """

    def __init__(self, pair: Pair) -> None:
        self.pair = pair
        parallel = {canonical_name(name): module for name, module in pair.parallel.named_modules()}
        self.rows = {
            name: rows
            for name, module in pair.reference.named_modules()
            if isinstance(module, nn.Embedding) and name in parallel and (rows := _rows(pair, name, module))
        }
        self._modules = {
            name: (pair.reference.get_submodule(name), parallel[canonical_name(name)]) for name in self.rows
        }
        self._handles: list[Any] = []
        self._seen: tuple[dict[str, Shapes], dict[str, Shapes]] = ({}, {})

    def __enter__(self) -> Borders:
        for name, modules in self._modules.items():
            for module, seen in zip(modules, self._seen, strict=True):
                hook = partial(self._other_rows, name, seen.setdefault(name, []))
                # Before a plan's own hooks: as the tokens come.
                self._handles.append(module.register_forward_pre_hook(hook, prepend=True))
        return self

    def __exit__(self, *error: object) -> None:
        for handle in self._handles:
            handle.remove()

    def _other_rows(self, name: str, seen: Shapes, module: nn.Module, args: tuple[Any, ...]) -> Any:
        tokens = args[0] if args else None
        if not isinstance(tokens, torch.Tensor) or tokens.is_floating_point() or is_dtensor(tokens):
            return None
        seen.append(tuple(tokens.shape))
        rows = torch.tensor(self.rows[name], device=tokens.device, dtype=tokens.dtype)
        places = torch.arange(tokens.numel(), device=tokens.device) % rows.numel()
        return (rows[places].view(tokens.shape), *args[1:])

    def replaced(self) -> bool:
        """Whether both models were asked for the same rows: a model may read an embedding's weight without
        calling it, or on a part of the sequence; collective.
        """
        golden, parallel = self._seen
        alike = {name: sorted(set(shapes)) for name, shapes in golden.items()} == {
            name: sorted(set(shapes)) for name, shapes in parallel.items()
        }
        return all(self.pair.world.merged(dict.fromkeys(self.pair.world.held, alike)))

    def tell(self, problem: str) -> str:
        """The message, which begins with the tokens that it is about."""
        name, rows = next(iter(self.rows.items()))
        shown = ", ".join(map(str, rows[:6]))
        return f"for tokens {shown}, at the borders of the ranks' parts of {name}, unlike others: {problem}"


def _rows(pair: Pair, name: str, module: nn.Embedding) -> list[int]:
    """Of each part but the first: the row that has the padding token's number there, its first row, and the
    one before that; then the last row of all, and the first.
    """
    size, padding = module.num_embeddings, module.padding_idx
    starts = _starts(pair, _first_name(pair, f"{name}.weight"), size)
    if not starts:
        return []
    padded = [start + padding for start in starts] if padding is not None else []
    rows = [*padded, *starts, *(start - 1 for start in starts), size - 1, 0]
    return list(dict.fromkeys(row for row in rows if row < size and row != padding))


def _first_name(pair: Pair, name: str) -> str:
    return next((first for first, names in aliases(pair.reference).items() if name in names), name)


def _starts(pair: Pair, name: str, size: int) -> list[int]:
    """Where the parts of the rows begin, but for the first; empty where the rows are not cut."""
    record = next((one for one in pair.weights.records if one.name == canonical_name(name)), None)
    if record is None or record.kind == "replicated" or record.dim != 0 or not record.held_as:
        return []
    held = pair.weights.held[record.held_as[0]]
    if record.is_dtensor:
        at, starts = 0, set()
        for one in held:
            at += one.local_shape[0]
            starts.add(at)
    else:
        starts = {s.source_start for one in held if one.layout for s in one.layout.segments}
    return sorted(start for start in starts if 0 < start < size)
