"""From the records of a run to what grows in it without end and what gets slower. Pure, no torch."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from pytest_gputrain.endurance.findings import Finding, only
from pytest_gputrain.endurance.growth import Growth, Point, growth, has_enough, slope_of
from pytest_gputrain.endurance.held import Held
from pytest_gputrain.endurance.pace import drift, straggler
from pytest_gputrain.endurance.records import StepRecord
from pytest_gputrain.endurance.shapes import of_new_shapes, with_shapes
from pytest_gputrain.endurance.words import (
    WORDS,
    Worst,
    cycles,
    graph,
    host,
    slower_words,
    straggler_words,
    tensors,
)
from pytest_gputrain.values import format_size

ByRank = Mapping[int, Sequence[StepRecord]]

_KB, _MB = 1024, 1024**2
# Of what was freed by Python's collector at the end, so that it was not kept.
_FREED = 0.5
# Of the growth in bytes, or a step: what live tensors and graphs have to have grown by to be its cause.
_EXPLAINS, _EACH_STEP, _FEWEST = 0.25, 0.04, 8
# Of the worst rank's slope: one that has so much is as good as proof that it is not that rank's affair.
_TOO = 0.5


@dataclass(frozen=True)
class _Measure:
    """A field of the records, and what its floor has to rise by, in all and by step, to count.

    is_thinned: measured at every step at first, and later at every 2nd, 4th, … only (``HeapMeter``).
    """

    kind: str
    value: Callable[[StepRecord], float | None]
    least: float
    least_slope: float = 0.0
    is_thinned: bool = False


# Torch and malloc themselves settle for hundreds of steps, by 200 bytes a step and 64 KiB in all; a list of
# losses as Python numbers takes 8 bytes a step.
_MEMORY = (
    _Measure("memory", lambda one: one.allocated_bytes, 64 * _KB, 256),
    _Measure("memory", lambda one: one.heap_bytes, 64 * _KB, 256, is_thinned=True),
    _Measure("memory", lambda one: one.tensor_bytes, 64 * _KB, 256),
)
# Where no tensor is known to be the cause, other things have to be ruled out by size.
_UNEXPLAINED, _UNEXPLAINED_SLOPE = 256 * _KB, _KB
# Python's small objects: numbers, strings, tuples, parts of others. Some for each metric of a step are well.
_OBJECTS = _Measure("objects", lambda one: one.objects, 8192, 100)
_HOST = _Measure("host_memory", lambda one: one.rss_bytes or None, 24 * _MB, 4 * _KB)
_COUNTED = (
    _Measure("open_files", lambda one: one.fds or None, 7),
    _Measure("threads", lambda one: one.threads or None, 7),
    _Measure("hooks", lambda one: one.hooks, 7),
    _Measure("groups", lambda one: one.groups, 7),
)
_CAUSES = ("hooks", "groups")  # of memory that grows as well: told first


def grows(records: Sequence[StepRecord]) -> bool:
    """Whether the memory of one rank may grow without end, so that it is worth asking who holds it."""
    return any(_growth(records, measure) for measure in (*_MEMORY, _OBJECTS, _HOST, *_COUNTED))


def growing(by_rank: ByRank, held_by: Mapping[int, Held | None]) -> tuple[list[Finding], list[str]]:
    """What grows without end, one finding a kind on the rank where it is worst; and notes.

    held_by: by rank, what was added in its last steps and who holds it; ranks that do not say so are missing.
    """
    memory, notes = _memory(by_rank, held_by)
    by_shape = next(filter(None, map(of_new_shapes, by_rank.values())), "")
    if by_shape and (memory is None or memory.kind == _HOST.kind):
        memory, notes = None, [*notes, by_shape]
    counted = [one for measure in _COUNTED if (one := _counted(by_rank, measure, held_by))]
    if memory is None and not counted:
        objects, note = _objects(by_rank, held_by)
        notes += note
        memory = objects or (None if note or by_shape else _of_host(by_rank, held_by))
    if memory is not None and memory.kind == _HOST.kind:
        memory = with_shapes(memory, by_rank)
    # What a file or a thread takes is freed with it.
    is_theirs = memory is not None and memory.kind == _HOST.kind and counted
    found = [*([memory] if memory and not is_theirs else []), *counted]
    return sorted(found, key=lambda one: one.kind not in _CAUSES), notes


def _counted(by_rank: ByRank, measure: _Measure, held_by: Mapping[int, Held | None]) -> Finding | None:
    if (worst := _worst(by_rank, measure)) is None:
        return None
    into = "" if measure.kind in _CAUSES else _grows_too(held_by.get(worst.rank))
    return _finding(measure.kind, worst, WORDS[measure.kind](worst) + into)


def _memory(by_rank: ByRank, held_by: Mapping[int, Held | None]) -> tuple[Finding | None, list[str]]:
    """On the device first, as that is what runs out."""
    notes: list[str] = []
    for measure in _MEMORY:
        worst = _worst(by_rank, measure)
        if worst is None:
            continue
        held = held_by.get(worst.rank)
        if held is not None and held.freed_bytes >= _FREED * worst.growth.total:
            notes.append(cycles(format_size(held.freed_bytes), worst, held))
            continue
        on_device = any(one.allocated_bytes is not None for one in by_rank[worst.rank])
        if finding := _of_memory(worst, held, on_device=on_device):
            return finding, notes
    return None, notes


def _of_host(by_rank: ByRank, held_by: Mapping[int, Held | None]) -> Finding | None:
    """Of tensors too: malloc's memory may have been measured too seldom to be judged, as in a run that ends
    before its time.
    """
    if (worst := _worst(by_rank, _HOST)) is None:
        return None
    held = held_by.get(worst.rank)
    if held is None or any(one.allocated_bytes is not None for one in by_rank[worst.rank]):
        return _counted(by_rank, _HOST, held_by)
    return _of_memory(worst, held, on_device=False)


def _objects(by_rank: ByRank, held_by: Mapping[int, Held | None]) -> tuple[Finding | None, list[str]]:
    if (worst := _worst(by_rank, _OBJECTS)) is None:
        return None, []
    held = held_by.get(worst.rank)
    if held is not None and held.freed_objects >= _FREED * worst.growth.total:
        return None, [cycles(f"{held.freed_objects:,} objects", worst, held)]
    return _finding(_OBJECTS.kind, worst, WORDS[_OBJECTS.kind](worst) + _grows_too(held)), []


def _grows_too(held: Held | None) -> str:
    return f"\n  grows with it: {held.container}" if held is not None and held.container else ""


def _of_memory(worst: Worst, held: Held | None, *, on_device: bool) -> Finding | None:
    grown = worst.growth
    is_sure = on_device or (grown.total >= _UNEXPLAINED and grown.low >= _UNEXPLAINED_SLOPE)
    if held is None:
        return _finding("memory", worst, tensors(worst)) if is_sure else None
    holder = f"\n  held by {held.holder}" if held.holder else ""
    if not held.holder or held.holder.startswith("no Python variable"):  # as of what is no tensor any more
        holder += _grows_too(held)
    if held.graph_nodes >= max(_FEWEST, held.steps * _EACH_STEP):
        nodes = held.graph_nodes / held.steps
        return _finding("graph", worst, graph(worst, nodes, held.holder) + holder)
    of_tensors = held.tensor_bytes / held.steps >= _EXPLAINS * grown.slope
    if held.tensors >= max(_FEWEST, held.steps * _EACH_STEP) or of_tensors:
        size = format_size(max(0, held.tensor_bytes))
        added = f"\n  {held.tensors:+d} live tensors ({size}) in the last {held.steps} steps"
        return _finding("memory", worst, tensors(worst) + holder + added)
    if on_device:
        return _finding("memory", worst, f"{tensors(worst)}\n  by no tensor that Python sees")
    return _finding(_HOST.kind, worst, host(worst) + _grows_too(held)) if is_sure else None


def pace(by_rank: ByRank) -> list[Finding]:
    """Steps that get slower, and a rank that all others wait for."""
    found = []
    if slower := drift(by_rank):
        figures = {"early_seconds": slower.early, "late_seconds": slower.late}
        found.append(
            Finding("step_time", slower.step, only(slower.ranks), slower_words(slower, len(by_rank)), figures)
        )
    if (slow := straggler(by_rank)) and slow.is_sure:
        figures = {"own_seconds": slow.seconds, "others_seconds": slow.others}
        found.append(Finding("straggler", slow.step, slow.rank, straggler_words(slow), figures))
    return found


def remarks(by_rank: ByRank) -> list[str]:
    """What is worth saying and no failure."""
    notes = []
    if (slow := straggler(by_rank)) and not slow.is_sure:
        notes.append(f"{straggler_words(slow).splitlines()[0]}; so little may be the machine's doing")
    shortest = min((len(records) for records in by_rank.values()), default=0)
    if by_rank and not any(has_enough(records) for records in by_rank.values()):
        notes.append(f"{shortest} step{'s' * (shortest != 1)} cannot show memory that grows (27 can)")
    return notes


def _growth(records: Sequence[StepRecord], measure: _Measure) -> Growth | None:
    return growth(_points(records, measure), least=measure.least, least_slope=measure.least_slope)


def _worst(by_rank: ByRank, measure: _Measure) -> Worst | None:
    found = {rank: one for rank, records in by_rank.items() if (one := _growth(records, measure))}
    if not found:
        return None
    rank = max(found, key=lambda rank: found[rank].slope)
    ranks = [r for r, records in by_rank.items() if r in found or _too(records, measure, found[rank])]
    return Worst(rank, found[rank], ranks, len(by_rank))


def _too(records: Sequence[StepRecord], measure: _Measure, worst: Growth) -> bool:
    """Does it grow on this rank as well in those steps, though not beyond doubt?"""
    points = [point for point in _points(records, measure) if point[0] >= worst.first]
    return len(points) > 1 and slope_of(points)[0] >= _TOO * worst.slope


def _points(records: Iterable[StepRecord], measure: _Measure) -> list[Point]:
    found = [(one.step, value) for one in records if (value := measure.value(one)) is not None]
    return _evenly(found) if measure.is_thinned else found


def _evenly(points: list[Point]) -> list[Point]:
    """Those at multiples of the largest distance, of what was measured at every step and then more seldom."""
    apart = max((later[0] - earlier[0] for earlier, later in itertools.pairwise(points)), default=1)
    return [point for point in points if point[0] % apart == 0]


def _finding(kind: str, worst: Worst, message: str) -> Finding:
    grown = worst.growth
    figures = {"a_step": grown.slope, "between": [grown.low, grown.high], "added": grown.total}
    return Finding(kind, grown.first, only(worst.ranks), message, figures)
