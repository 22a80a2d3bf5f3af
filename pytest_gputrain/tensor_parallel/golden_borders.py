"""Tokens at the borders of the vocabulary's parts: those that a comparison over ranks is about.

Of a vocabulary of 50,000 a batch has a few dozen tokens: hardly ever those where one rank's rows end and the
next one's begin, nor the one whose number within a part is that of the padding token.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import nn

from pytest_gputrain.case import pytree
from pytest_gputrain.tensor_parallel.golden_model import aliases
from pytest_gputrain.tensor_parallel.golden_pair import Pair
from pytest_gputrain.tensor_parallel.golden_world import is_dtensor
from pytest_gputrain.trace.names import canonical_name

Shapes = list[tuple[int, ...]]


class Borders:
    """In it, embeddings whose rows are cut over the ranks are asked for other rows than the batch says: those
    of the reference and of the parallel model alike.

    rows: by the embedding's name, those that are asked for, the first ones first where an input has not room
    for all. Empty where no embedding is cut so. asks: whether anything is asked for.
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
        self._scored = next(iter(self.rows.items()), None)
        self._handles: list[Any] = []
        self._seen: tuple[dict[str, Shapes], dict[str, Shapes]] = ({}, {})

    def targets(self, batch: Any) -> Any:
        """The batch, with such tokens as targets too: logits are cut as an embedding is, and a loss over
        parts of them has borders of its own. Those that are to be ignored (below zero) stay.
        """
        self._scored = self._scored or _of_logits(self.pair, batch)
        found = _targets(batch)
        if self._scored is None or not found:
            return batch
        rows = torch.tensor(self._scored[1])

        def other(tensor: torch.Tensor) -> torch.Tensor:
            if not any(tensor is one for one in found):
                return tensor
            places = torch.arange(tensor.numel()) % rows.numel()
            mine = rows[places].view(tensor.shape).to(tensor.device, tensor.dtype)
            return torch.where(tensor < 0, tensor, mine)

        return pytree.map_tensors(other, batch)

    @property
    def asks(self) -> bool:
        return self._scored is not None

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
        assert self._scored is not None
        name, rows = self._scored
        shown = ", ".join(map(str, rows[:6]))
        return f"for tokens {shown}, at the borders of the ranks' parts of {name}, unlike others: {problem}"


def _targets(batch: Any) -> list[torch.Tensor]:
    """The tensors of tokens that a loss takes as targets: the inputs again, or those moved by one place."""
    tokens = [one for one in pytree.tensors(batch) if one.dim() == 2 and _is_tokens(one)]
    if len(tokens) == 1:
        return tokens
    return [
        one
        for one in tokens
        if any(_follows(one, other) for other in tokens if other is not one and other.shape == one.shape)
    ]


def _is_tokens(tensor: torch.Tensor) -> bool:
    return tensor.dtype in (torch.int64, torch.int32) and tensor.numel() > 0 and int(tensor.max()) > 1


def _follows(target: torch.Tensor, tokens: torch.Tensor) -> bool:
    """Whether all targets that count are the tokens themselves, or the next ones."""
    pairs = ((target, tokens), (target[:, :-1], tokens[:, 1:]))
    return any(bool((one[one >= 0] == other[one >= 0]).all()) for one, other in pairs if one.numel())


def _of_logits(pair: Pair, batch: Any) -> tuple[str, list[int]] | None:
    """The matrix that logits come from, and the rows at the borders of its parts, where it is cut so."""
    size = (pair.output_shape(batch) or (0,))[-1]
    for record in pair.weights.records:
        of_vocabulary = len(record.shape) == 2 and record.shape[0] == size > 0
        rows = _at(_starts(pair, record.name, size), size) if of_vocabulary else []
        if rows:
            return record.name.removesuffix(".weight"), rows
    return None


def _rows(pair: Pair, name: str, module: nn.Embedding) -> list[int]:
    """Of each part but the first: the row that has the padding token's number there, its first row, and the
    one before that; then the last row of all, and the first.
    """
    size, padding = module.num_embeddings, module.padding_idx
    starts = _starts(pair, _first_name(pair, f"{name}.weight"), size)
    if not starts:
        return []
    padded = [start + padding for start in starts] if padding is not None else []
    return [row for row in dict.fromkeys([*padded, *_at(starts, size)]) if row < size and row != padding]


def _at(starts: list[int], size: int) -> list[int]:
    """First rows, the ones before them, the last and the first row of all; none where nothing is cut."""
    return [*starts, *(start - 1 for start in starts), size - 1, 0] if starts else []


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
