"""Batches of every shape that people use can be walked, cut and joined."""

from __future__ import annotations

from collections import UserDict
from dataclasses import dataclass
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from pytest_gputrain.case import pytree


class Pair(NamedTuple):
    x: Tensor
    y: Tensor


@dataclass(frozen=True)
class Record:
    x: Tensor
    name: str


class Plain:
    def __init__(self, x: Tensor) -> None:
        self.x = x


class Encoding(UserDict[str, Any]):
    """As Hugging Face's BatchEncoding is made."""


def numbers(size: int = 4) -> Tensor:
    return torch.arange(size * 2.0).view(size, 2)


BATCHES = {
    "tensor": numbers(),
    "dict": {"x": numbers(), "note": "kept"},
    "list": [numbers(), numbers()],
    "named tuple": Pair(numbers(), numbers()),
    "dataclass": Record(numbers(), "kept"),
    "object": Plain(numbers()),
    "mapping": Encoding({"x": numbers()}),
    "nested": {"a": [Pair(numbers(), numbers())], "scale": torch.tensor(2.0)},
}


@pytest.mark.parametrize("batch", BATCHES.values(), ids=BATCHES)
def test_cutting_and_joining_gives_the_batch_back(batch: Any) -> None:
    parts = pytree.chunk(batch, 2)
    assert [pytree.batch_length(part) for part in parts] == [2, 2]
    assert all(type(part) is type(batch) for part in parts)
    joined = pytree.join(parts)
    for (path, leaf), (other_path, other) in zip(pytree.leaves(batch), pytree.leaves(joined), strict=True):
        assert path == other_path
        assert torch.equal(leaf, other) if pytree.is_tensor(leaf) else leaf == other


def test_mapping_leaves_the_original_alone() -> None:
    batch = Encoding({"x": numbers()})
    doubled = pytree.map_tensors(lambda tensor: tensor * 2, batch)
    assert torch.equal(batch["x"], numbers())
    assert torch.equal(doubled["x"], numbers() * 2)


@given(length=st.integers(1, 40), parts=st.integers(1, 40))
def test_parts_are_as_equal_as_can_be(length: int, parts: int) -> None:
    batch = torch.arange(length)
    if parts > length:
        with pytest.raises(ValueError, match="cannot split a batch of"):
            pytree.chunk(batch, parts)
        return
    sizes = [len(part) for part in pytree.chunk(batch, parts)]
    assert sum(sizes) == length
    assert max(sizes) - min(sizes) <= 1


@pytest.mark.parametrize(
    ("batch", "parts", "line"),
    [
        (numbers(), 0, "cannot split a batch into 0 parts; give 1 or more"),
        (numbers(), 5, "cannot split a batch of 4 into 5 parts; 5 > 4"),
        ("text", 2, "cannot split a batch without tensors; give the case a split(batch, n)"),
        (
            [torch.ones(4), torch.ones(6)],
            2,
            "cannot split on dimension 0: the batch's tensors disagree there ([4, 6]); "
            "give the case a split(batch, n)",
        ),
    ],
)
def test_what_cannot_be_cut_is_told(batch: Any, parts: int, line: str) -> None:
    with pytest.raises(ValueError) as raised:  # noqa: PT011 - the literal text follows
        pytree.chunk(batch, parts)
    assert str(raised.value) == line
