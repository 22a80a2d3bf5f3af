"""What a run's growth and pace are called: the first line says what, where and what to do. Pure, no torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from pytest_gputrain.endurance.findings import on
from pytest_gputrain.endurance.growth import Growth
from pytest_gputrain.endurance.held import Held
from pytest_gputrain.endurance.pace import Drift, Straggler
from pytest_gputrain.values import format_size


@dataclass(frozen=True)
class Worst:
    """The rank where something grows most, and all on which it grows."""

    rank: int
    growth: Growth
    ranks: Sequence[int]
    world_size: int

    def by(self, each: str) -> str:
        """``on rank 1, by 4.0 KiB a step from step 20 to 200``."""
        up_to = "up to " if len(self.ranks) > 1 else ""
        steps = f"from step {self.growth.first} to {self.growth.last}"
        return f"{on(self.ranks, self.world_size)}, by {up_to}{each} a step {steps}"


def tensors(worst: Worst) -> str:
    return (
        f"memory grows without end {worst.by(_size(worst.growth.slope))}; keep numbers (.item()) or drop "
        f"what steps keep\n  {_between(worst.growth)}"
    )


def graph(worst: Worst, nodes: float, holder: str) -> str:
    each = f"{nodes:.1f} nodes and {_size(worst.growth.slope)}"
    way_out = "keep loss.item() or loss.detach(), not the loss"
    if ".__traceback__" in holder:
        way_out = "keep str(error), not the exception: its traceback keeps all variables of its frames"
    return (
        f"the autograd graphs of earlier steps are kept {worst.by(each)}; {way_out}\n"
        f"  {_between(worst.growth)}"
    )


def host(worst: Worst) -> str:
    return (
        f"host memory grows without end {worst.by(_size(worst.growth.slope))}, and live tensors do not; "
        f"look for lists, arrays and caches that each step adds to\n  {_between(worst.growth)}"
    )


def _objects(worst: Worst) -> str:
    return (
        f"Python objects grow without end {worst.by(f'{worst.growth.slope:.0f}')}: {worst.growth.total:,.0f} "
        "in all; look for lists, dicts and caches that each step adds to"
    )


def cycles(what: str, worst: Worst, held: Held) -> str:
    """A note, as nothing is lost for good."""
    until = (
        "it runs" if held.collects else "gc.collect() is called: the program has switched the collector off"
    )
    return (
        f"{what} on rank {worst.rank} were freed only by Python's collector: steps leave reference cycles "
        f"that hold memory until {until}"
    )


def _files(worst: Worst) -> str:
    return (
        f"open files grow {worst.by(f'{worst.growth.slope:.2g}')}: {worst.growth.total:.0f} in all; close "
        "what each step opens"
    )


def _threads(worst: Worst) -> str:
    return (
        f"threads grow {worst.by(f'{worst.growth.slope:.2g}')}: {worst.growth.total:.0f} in all; join what "
        "each step starts"
    )


def _hooks(worst: Worst) -> str:
    return (
        f"hooks on the model grow {worst.by(f'{worst.growth.slope:.2g}')}: {worst.growth.total:.0f} in all, "
        "of which each runs in every step; register them once, or call remove() on what registering returned"
    )


def _groups(worst: Worst) -> str:
    return (
        f"the optimizer's parameter groups grow {worst.by(f'{worst.growth.slope:.2g}')}: "
        f"{worst.growth.total:.0f} in all, with state of their own; add each group once"
    )


def _between(grown: Growth) -> str:
    between = f"{_size(grown.low)} and {_size(grown.high)}"
    return f"{_size(grown.total)} in all; with 95 % confidence between {between} a step"


def slower_words(slower: Drift, world_size: int) -> str:
    where = f" {on(slower.ranks, world_size)}" if len(slower.ranks) < world_size else ""
    return (
        f"steps take {slower.ratio:.1f} times as long{where} from step {slower.step} on: "
        f"{1000 * slower.late:.1f} ms, {1000 * slower.early:.1f} ms before; look for what a step does for "
        "all steps before it\n  time in which others had the processor, or other ranks were waited for, does "
        "not count; where the work grows on purpose, name stable_training:step_time in expected_failures"
    )


def straggler_words(slow: Straggler) -> str:
    return (
        f"rank {slow.rank} keeps the others waiting, in {100 * slow.share:.0f} % of the steps from step "
        f"{slow.step} on: {1000 * slow.seconds:.1f} ms {slow.where}, {1000 * slow.others:.1f} ms on the "
        "others; give it as much to do as them\n  time in which others had the processor does not count"
    )


def _size(num_bytes: float) -> str:
    return format_size(round(num_bytes))


WORDS: Mapping[str, Callable[[Worst], str]] = {
    "host_memory": host,
    "objects": _objects,
    "open_files": _files,
    "threads": _threads,
    "hooks": _hooks,
    "groups": _groups,
}
