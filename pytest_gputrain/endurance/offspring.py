"""From the records of a run to what grows in the processes that its ranks have started. Pure, no torch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from pytest_gputrain.endurance.findings import Finding, only
from pytest_gputrain.endurance.growth import Growth, Point, growth
from pytest_gputrain.endurance.records import StepRecord
from pytest_gputrain.launch.output import rank_list
from pytest_gputrain.values import format_size

ByRank = Mapping[int, Sequence[StepRecord]]

# An interpreter and malloc settle within some MiB. Files and processes: as of the rank itself.
_LEAST_BYTES, _LEAST_SLOPE = 8 * 1024**2, 4 * 1024
_LEAST_COUNT = 7


@dataclass(frozen=True)
class _Process:
    """One that was there to the end of the run, as it was seen on the way."""

    rank: int
    pid: int
    name: str
    memory: list[Point]
    files: list[Point]


@dataclass(frozen=True)
class _Grown:
    process: _Process
    growth: Growth
    others: int  # processes that grow as well


def offspring(by_rank: ByRank, names: Mapping[int, str]) -> list[Finding]:
    """What grows without end; names: by process id, better ones than the records have."""
    processes = [one for rank, records in by_rank.items() for one in _processes(rank, records, names)]
    found = [*_number(by_rank)]
    if memory := _worst(
        [(p, growth(p.memory, least=_LEAST_BYTES, least_slope=_LEAST_SLOPE)) for p in processes]
    ):
        found.append(_finding("child_memory", memory, _memory(memory)))
    if files := _worst([(p, growth(p.files, least=_LEAST_COUNT)) for p in processes]):
        found.append(_finding("child_files", files, _files(files)))
    return found


def _processes(rank: int, records: Sequence[StepRecord], names: Mapping[int, str]) -> list[_Process]:
    looks = [(record.step, record.children) for record in records if record.children is not None]
    if not looks:
        return []
    found = []
    for last in looks[-1][1]:
        pid = last["pid"]
        seen = [(step, one) for step, those in looks for one in those if one["pid"] == pid]
        memory, files = ([(step, float(one[key])) for step, one in seen] for key in ("bytes", "fds"))
        found.append(_Process(rank, pid, names.get(pid, last["name"]), memory, files))
    return found


def _number(by_rank: ByRank) -> list[Finding]:
    found = []
    for rank, records in by_rank.items():
        points = [(one.step, float(one.num_children)) for one in records if one.num_children is not None]
        if grown := growth(points, least=_LEAST_COUNT):
            found.append((grown.slope, rank, grown))
    if not found:
        return []
    ranks = sorted(rank for _, rank, _ in found)
    _, rank, grown = max(found)
    kept = next(one.children for one in reversed(by_rank[rank]) if one.children)
    name = Counter(one["name"] for one in kept).most_common(1)[0][0]
    started = f"processes that {_starters(ranks, len(by_rank))} started grow"
    message = (
        f"{started}, by {_by(grown, f'{grown.slope:.2g}')}: "
        f"{grown.total:.0f} in all, most of them {name}; wait for what each step starts, or end it"
    )
    return [Finding("children", grown.first, only(ranks), message, _figures(grown))]


def _starters(ranks: Sequence[int], world_size: int) -> str:
    if len(ranks) == world_size > 1:
        return "every rank has"
    return f"{rank_list(ranks)} {'has' if len(ranks) == 1 else 'have'}"


def _worst(tried: Sequence[tuple[_Process, Growth | None]]) -> _Grown | None:
    grown = [(process, one) for process, one in tried if one is not None]
    if not grown:
        return None
    process, most = max(grown, key=lambda pair: pair[1].slope)
    return _Grown(process, most, len(grown) - 1)


def _finding(kind: str, grown: _Grown, message: str) -> Finding:
    figures = {**_figures(grown.growth), "process": grown.process.pid}
    return Finding(kind, grown.growth.first, grown.process.rank, message, figures)


def _figures(grown: Growth) -> dict[str, object]:
    return {"a_step": grown.slope, "between": [grown.low, grown.high], "added": grown.total}


def _memory(grown: _Grown) -> str:
    one = grown.growth
    total, low, high = _size(one.total), _size(one.low), _size(one.high)
    return (
        f"memory of {_who(grown)} grows without end, by {_by(one, _size(one.slope))}; look at what it keeps "
        f"of each {_thing(grown)}\n  {total} in all; with 95 % confidence between {low} and {high} a step"
    )


def _files(grown: _Grown) -> str:
    one = grown.growth
    return (
        f"open files of {_who(grown)} grow, by {_by(one, f'{one.slope:.2g}')}: {one.total:.0f} in all; close "
        f"what each {_thing(grown)} opens"
    )


def _who(grown: _Grown) -> str:
    process = grown.process
    more = f", and {grown.others} more," if grown.others else ""
    return f"{process.name} (process {process.pid} of rank {process.rank}){more}"


def _thing(grown: _Grown) -> str:
    return "sample" if "data loader" in grown.process.name else "step"


def _by(grown: Growth, each: str) -> str:
    return f"{each} a step from step {grown.first} to {grown.last}"


def _size(num_bytes: float) -> str:
    return format_size(round(num_bytes))
