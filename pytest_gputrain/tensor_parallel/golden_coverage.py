"""What all ranks together hold of one parameter, in words."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pytest_gputrain.tensor_parallel.records import WeightRecord

if TYPE_CHECKING:
    from pytest_gputrain.tensor_parallel.golden_weights import Held, Weights

# Values that a cast to a shorter type leaves: a parallelize that casts is seen in outputs, not here.
ROUNDED = 0.01
Rows = list[tuple[int, int]]


def weight_record(name: str, golden: Any, weights: Weights, trainable: bool) -> WeightRecord:
    """Of one parameter of the reference, from what every rank holds of it."""
    holders = weights.holders(name)
    by_rank = [weights.held[holder] for holder in holders]
    shape = tuple(golden.shape)
    if not holders:
        return WeightRecord(name, shape, "not found", None, (), problem=_absent(name, weights))
    first = by_rank[0]
    dim = _dim(first, name)
    rows = [_rows(by_rank, name, rank) for rank in range(len(first))]
    kind = _kind(rows, shape, dim, first)
    return WeightRecord(
        name,
        shape,
        kind,
        dim if kind != "replicated" else None,
        tuple(held.local_shape for held in first),
        tuple(holders),
        padding=_padding(by_rank),
        is_dtensor=any(held.is_dtensor for held in first),
        problem=_changed(name, by_rank)
        or _uncovered(name, rows, shape, dim)
        or _thawed(name, first, trainable),
    )


def _dim(by_rank: list[Held], name: str) -> int:
    layout = next(held.layout for held in by_rank if held.layout and held.layout.segments)
    return 1 - layout.dim if layout.transposed else layout.dim


def _rows(by_rank: list[list[Held]], name: str, rank: int) -> Rows:
    """(start, length) of what one rank holds of the source, over all parameters, in order."""
    held = [holder[rank].layout for holder in by_rank]
    rows = [(s.source_start, s.length) for one in held if one for s in one.segments if s.source == name]
    return sorted(set(rows))


def _covered(rows: Rows, size: int) -> list[bool]:
    covered = [False] * size
    for start, length in rows:
        covered[start : start + length] = [True] * length
    return covered


def _kind(rows: list[Rows], shape: tuple[int, ...], dim: int, first: list[Held]) -> str:
    if any(held.sharded for held in first):
        return "sharded"
    size = shape[dim] if shape else 1
    counts = [sum(_covered(one, size)) for one in rows]
    if all(count == size for count in counts):
        return "replicated"
    return "sharded" if sum(counts) <= size else "partly replicated"


def _padding(by_rank: list[list[Held]]) -> int:
    total = 0
    for holder in by_rank:
        for held in holder if not holder[0].is_dtensor else holder[:1]:
            if held.layout and held.whole_shape:
                total += held.whole_shape[held.layout.dim] - held.layout.matched
    return total


def _changed(name: str, by_rank: list[list[Held]]) -> str | None:
    for holder in by_rank:
        off = [held.off or 0.0 for held in holder]
        wrong = [rank for rank, value in enumerate(off) if value > ROUNDED]
        if wrong:
            where = "every rank" if len(wrong) == len(off) else f"rank {', '.join(map(str, wrong))}"
            return (
                f"right after parallelize {name} is not the reference's on {where}, off by "
                f"{max(off):.1%}: initialised again, or another part of it than its shape says"
            )
    return None


def _uncovered(name: str, rows: list[Rows], shape: tuple[int, ...], dim: int) -> str | None:
    size = shape[dim] if shape else 1
    covered = _covered([row for one in rows for row in one], size)
    if all(covered):
        return None
    first = covered.index(False)
    last = next((i for i in range(first, size) if covered[i]), size) - 1
    what = f"{name}, {first} to {last} of {size} on dimension {dim}, is on no rank"
    if len(rows) > 1 and all(one == rows[0] for one in rows):
        return f"every rank holds the same part: {what}"
    return what


def _thawed(name: str, first: list[Held], trainable: bool) -> str | None:
    if all(held.trainable == trainable for held in first if held.layout and held.layout.segments):
        return None
    before, after = ("trainable", "frozen") if trainable else ("frozen", "trainable")
    return f"{name} is {before} in the reference and {after} after parallelize"


def _absent(name: str, weights: Weights) -> str:
    lost = [own for own, held in weights.held.items() if any(one.layout is None for one in held)]
    held = f"; {', '.join(lost[:3])} holds nothing of the reference's" if lost else ""
    return f"{name} is in no parameter of the parallel model, neither by name nor by content{held}"
