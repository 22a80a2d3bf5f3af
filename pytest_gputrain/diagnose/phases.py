"""Which phases a plan has, for what is given. Pure.

One step hides an unused parameter (DistributedDataParallel says so in the second), so the same runs over
several steps, and then to the program's own end, where ranks with uneven data part.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from pytest_gputrain.diagnose.records import Kind, Phase

STEPS = 3
# As a user names them; "branches" is one phase a branch, "checkpointing" bisects when it fails.
NAMES = (
    "ddp_one_step", "ddp_steps", "ddp_whole", "gloo", "branches", "static_graph", "find_unused", "fsdp2",
    "single", "checkpointing", "gradient_parity",
)  # fmt: skip
SEED = {"GPUTRAIN_SEED": "1234"}
STATIC_GRAPH = {"GPUTRAIN_DDP_STATIC_GRAPH": "1"}
FIND_UNUSED = {"GPUTRAIN_DDP_FIND_UNUSED": "1"}
# In one process DDP would still refuse unused parameters: there it is to reduce nothing.
ALONE = {"GPUTRAIN_GRAD_DIGEST": "1", "GPUTRAIN_DDP_NO_SYNC": "1", **SEED}


@dataclass(frozen=True)
class Given:
    """What the plan is for.

    backend: what the first phases run on. layers: the range to look at, None for all. checkpointing:
    whether the user says how to turn it on (a case's ``set_checkpointing``), so that its failure is theirs.
    fsdp2: why it cannot be tried; empty if it can.
    """

    kind: Kind
    backend: str = "gloo"
    ranks: int = 2
    steps: int = STEPS
    branches: tuple[str, ...] = ()
    layers: tuple[int, int | None] | None = None
    checkpointing: bool = False
    fsdp2: str = ""


def plan(given: Given, chosen: Sequence[str] | None = None) -> list[Phase]:
    """The phases in the order in which they run; those in ``chosen`` accuse, because asked for."""
    phases = [*_program(given), *_branches(given), *_variants(given), *_single(given)]
    if chosen is None:
        return phases
    kept = [phase for phase in phases if family(phase.name) in chosen]
    return [replace(phase, accuses=True) for phase in kept]


def with_branches(phases: Sequence[Phase], given: Given, branches: Sequence[str]) -> list[Phase]:
    """The same plan, for a model of which it is known by now that it declares branches."""
    found = _branches(replace(given, branches=tuple(branches)))
    return [new for phase in phases for new in (found if phase.name == "branches" else [phase])]


def unknown_names(names: Iterable[str]) -> list[str]:
    return [name for name in names if name not in NAMES]


def family(name: str) -> str:
    """The name a user knows it by: ``branch:sliding`` is one of "branches"."""
    return "branches" if name.startswith("branch:") else name


def _program(given: Given) -> list[Phase]:
    """The program as it is."""
    several = f"{given.steps} steps"
    one = Phase("ddp_one_step", "one step on all ranks, traced", "program", given.ranks, 1)
    more = Phase(
        "ddp_steps", f"{several}: one hides an unused parameter", "program", given.ranks, given.steps
    )
    whole = Phase("ddp_whole", "to the program's own end", "program", given.ranks, None)
    if given.kind == "case":
        whole = replace(whole, skip="a case has no end of its own; ddp_completes walks its data")
    gloo = Phase(
        "gloo", f"{several} on gloo instead of NCCL", "backend", given.ranks, given.steps,
        {"GPUTRAIN_BACKEND": "gloo"},
    )  # fmt: skip
    if given.backend != "nccl":
        gloo = replace(gloo, skip=f"the phases above ran on {given.backend} already")
    return [one, more, whole, gloo]


def _branches(given: Given) -> list[Phase]:
    # The parameters of the other branches get no gradient then: without find_unused DDP would refuse.
    phases = [
        Phase(
            f"branch:{name}", f"branch {name} alone", "branch", given.ranks, given.steps,
            {"GPUTRAIN_FORCE_BRANCH": name, **FIND_UNUSED}, branch=name,
        )
        for name in given.branches
    ]  # fmt: skip
    none = Phase("branches", "each branch alone", "branch", given.ranks, given.steps)
    return phases or [replace(none, skip="the model declares no branches")]


def _variants(given: Given) -> list[Phase]:
    """Other ways of wrapping the same model. They explain a failure; alone they accuse nobody."""

    def variant(name: str, title: str, switches: dict[str, str]) -> Phase:
        return Phase(name, title, "variant", given.ranks, given.steps, switches, accuses=False)

    static = variant("static_graph", "DDP with static_graph=True", STATIC_GRAPH)
    unused = variant("find_unused", "DDP with find_unused_parameters=True", FIND_UNUSED)
    fsdp2 = replace(variant("fsdp2", "FSDP2 (fully_shard) instead of DDP", {}), wrap="fsdp2")
    return [static, unused, replace(fsdp2, skip=given.fsdp2)]


def _single(given: Given) -> list[Phase]:
    steps, layers = given.steps, given.layers or (0, None)
    single = Phase("single", "one process, no checkpointing", "single", 1, steps, ALONE, accuses=False)
    full = Phase(
        "checkpointing", "one process, activation checkpointing, bisected over layers if it fails",
        "checkpointing", 1, steps, {"GPUTRAIN_GC_RANGE": range_text(layers), **ALONE},
        layers=layers, accuses=given.checkpointing,
    )  # fmt: skip
    parity = replace(full, name="gradient_parity", title="gradients with checkpointing equal those without")
    return [single, full, parity]


def range_text(layers: tuple[int, int | None]) -> str:
    """``2:4``, half open, as the switch takes it; an open end is empty."""
    start, end = layers
    return f"{start}:{'' if end is None else end}"
