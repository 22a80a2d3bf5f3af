"""From the shapes of a stream's batches to what varies, and to the fixed length that would do.

A shape is what dynamo guards on: which tensors there are, their sizes and their types. Imports no torch.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

# path -> (sizes, dtype), in the batch's own order.
Shapes = tuple[tuple[str, tuple[int, ...], str], ...]
Tensor = tuple[tuple[int, ...], str] | None
Kind = Literal["columns", "rows", "dtype", "missing"]
# Lengths are padded to multiples of this: what matrix units like, and what people choose.
MULTIPLE = 8


@dataclass(frozen=True)
class Seen:
    """What a stream gave. shapes: of each batch, in order; ended: to the end of the stream."""

    shapes: list[Shapes]
    ended: bool

    @property
    def usual(self) -> Shapes:
        """The shapes of most batches, of the earliest where there are as many."""
        return max(dict.fromkeys(self.shapes), key=self.shapes.count)

    def different(self) -> list[int]:
        """Indices of the batches that are not as usual."""
        return [index for index, shapes in enumerate(self.shapes) if shapes != self.usual]

    def sizes(self, path: str) -> list[tuple[int, ...]]:
        """Of one tensor, in every batch that has it."""
        return [sizes for shapes in self.shapes for name, sizes, _ in shapes if name == path]

    def batch(self, index: int) -> str:
        last = self.ended and index == len(self.shapes) - 1
        return f"batch {index}, the last" if last else f"batch {index}"


@dataclass(frozen=True)
class Variation:
    """Tensors that are not always the same, in the same way. index: the first batch in which they are not.

    usual, other: what they are, as a message has it; dimension: which one varies, of sizes.
    """

    paths: tuple[str, ...]
    kind: Kind
    usual: str
    other: str
    index: int
    dimension: int = 0


def variations(seen: Seen) -> list[Variation]:
    """What differs from the usual batch, each tensor and kind once; what most batches show comes first."""
    found: dict[tuple[object, ...], list[str]] = {}
    told: set[tuple[object, ...]] = set()
    usual = _by_path(seen.usual)
    for index in seen.different():
        other = _by_path(seen.shapes[index])
        for path in {**usual, **other}:
            for kind, dimension, was, now in _differences(usual.get(path), other.get(path)):
                if (path, kind, dimension) not in told:
                    told.add((path, kind, dimension))
                    found.setdefault((kind, was, now, index, dimension), []).append(path)
    return [Variation(tuple(paths), *key) for key, paths in found.items()]  # type: ignore[arg-type]


def _by_path(shapes: Shapes) -> dict[str, tuple[tuple[int, ...], str]]:
    return {path: (sizes, dtype) for path, sizes, dtype in shapes}


def _differences(usual: Tensor, other: Tensor) -> Iterator[tuple[Kind, int, str, str]]:
    if usual is None or other is None or len(usual[0]) != len(other[0]):
        yield "missing", 0, _words(usual), _words(other)
        return
    if usual[1] != other[1]:
        yield "dtype", 0, usual[1], other[1]
    for dimension, (was, now) in enumerate(zip(usual[0], other[0], strict=True)):
        if was != now:
            yield ("columns" if dimension else "rows"), dimension, str(usual[0]), str(other[0])


def _words(tensor: Tensor) -> str:
    return "not there" if tensor is None else f"{tensor[0]} {tensor[1]}"


def in_words(varies: Variation, seen: Seen) -> str:
    """``['idx'] is (4, 37) in batch 0 and (4, 61) in batch 1``."""
    first = seen.shapes.index(seen.usual)
    one, other = (first, varies.usual), (varies.index, varies.other)
    (a, was), (b, now) = sorted((one, other))
    verb = "is" if len(varies.paths) == 1 else "are"
    names = ", ".join(path or "the batch" for path in varies.paths)
    return f"{names} {verb} {was} in {seen.batch(a)} and {now} in {seen.batch(b)}"


def advice(varies: Variation, seen: Seen) -> str:
    """The way out, with the fixed length that would do and what it costs."""
    if varies.kind == "dtype":
        return f"convert to one type where batches are made: {varies.usual} in every batch"
    if varies.kind == "missing":
        return "give every batch the same tensors (a mask of ones where nothing is masked)"
    if varies.kind == "rows":
        if seen.ended and varies.index == len(seen.shapes) - 1:
            return (
                "the last batch of the data is short: drop_last=True, or fill it up with samples that do not "
                "count"
            )
        return "give every batch the same number of samples, or compile with dynamic=True"
    sizes = [size[varies.dimension] for size in seen.sizes(varies.paths[0]) if len(size) > varies.dimension]
    length = fixed_length(max(sizes))
    short = f", not {length - 1}" if length - 1 in sizes else ""
    return (
        f"pad to a fixed length instead of the longest of each batch; {length} would do{short}, "
        f"{more_tokens(varies, seen, length):.0%} more tokens"
    )


def fixed_length(longest: int) -> int:
    """The columns that hold so many: rounded up to a multiple of 8.

    2047 give 2048: what is compiled for is the columns of the inputs. One more than a multiple stays as it
    is, for tokens that are cut into inputs and targets, shifted by one: 2049 give 2048 inputs.
    """
    if longest < MULTIPLE or longest % MULTIPLE == 1:
        return longest
    return -(-longest // MULTIPLE) * MULTIPLE


def more_tokens(varies: Variation, seen: Seen, length: int) -> float:
    """How many more elements a fixed length has, as a share of those there are."""
    sizes = [size for size in seen.sizes(varies.paths[0]) if len(size) > varies.dimension]
    now = sum(size[0] * size[varies.dimension] for size in sizes)
    return sum(size[0] for size in sizes) * length / now - 1 if now else 0.0
