"""In a rank: some compiled steps, what the loop saves, and that loaded into a fresh, uncompiled model.

Beside it the same loop uncompiled, by which to tell what compiling changes: a loop that saves adapters, or a
moving average, does so either way.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from pytest_gputrain.case import TrainingCase
from pytest_gputrain.case.loading import describe
from pytest_gputrain.checks.context import CheckContext
from pytest_gputrain.checks.keys_outputs import evaluated, furthest, with_numbers_of
from pytest_gputrain.checks.load_watch import Load, watched_loads
from pytest_gputrain.checks.result import CheckFailed
from pytest_gputrain.checks.saved_state import (
    Tensors,
    bare,
    differing,
    every_name,
    missing_and_unexpected,
    prefixed,
    round_as_saved,
    saved_tensors,
)

if TYPE_CHECKING:
    from pytest_gputrain.checks.compile_session import Compiled

STEPS = 3
# Of the seed of fresh weights, from that of training.
APART = 77_777
_EITHER_WAY = "compiled or not, what the loop saves is not "


@dataclass
class Saved:
    """What came of it. keys: saved for the model; prefixed: of all that is saved, those with _orig_mod.

    missing, unexpected: keys, where it does not load; refused: why not; stale: tensors saved that are not
    those that train; ignored: tensors that loading leaves as they were. difference: of outputs, relative, and
    what rounding explains. by_original: where evaluation of the original compiles. loads: of the case itself.
    apart: tensors saved that are not the original's. wanted: a key of the model; others: what is saved where
    nothing is the model's.
    """

    keys: list[str] = field(default_factory=list)
    prefixed: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    refused: str = ""
    stale: list[str] = field(default_factory=list)
    ignored: list[str] = field(default_factory=list)
    difference: float = 0.0
    tolerance: float = 0.0
    by_original: list[str] = field(default_factory=list)
    loads: list[Load] = field(default_factory=list)
    apart: list[str] = field(default_factory=list)
    wanted: str = ""
    others: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    graphs: int = 0


@dataclass(frozen=True)
class Twin:
    """The same loop uncompiled: what it saves, and whether that is what trains."""

    tensors: Tensors
    stale: list[str]


def save_and_load(case: TrainingCase, ctx: CheckContext) -> Saved:
    """In a rank. Raises CheckFailed where the case's state_dict raises; whatever else the case raises."""
    from pytest_gputrain.checks.compile_context import backend_of
    from pytest_gputrain.checks.compile_session import build_compiled
    from pytest_gputrain.compile.monitor import compile_monitor

    twin = _uncompiled(case, ctx)
    with backend_of(ctx), compile_monitor() as monitor, watched_loads() as loads:
        built = build_compiled(case, ctx)
        _train(case, ctx, built.compiled, built.optimizer)
        saved = Saved(graphs=len(monitor.graphs))
        state = _state(case, built.holder)
        # Of a wrapper that compile() returns a loop may save what is inside.
        tensors = saved_tensors(state, built.holder) or saved_tensors(state, built.model)
        saved.keys, saved.prefixed, saved.loads = list(tensors), prefixed(state), list(loads)
        saved.wanted = next(map(bare, built.model.state_dict()), "")
        saved.others = [] if tensors else every_name(state)
        if tensors and not saved.prefixed:
            fresh = _loaded(case, ctx, saved, tensors, twin, built)
            if fresh is not None:
                round_as_saved(tensors, built.model)
                _compare(case, ctx, saved, fresh, built, monitor)
    return saved


def _uncompiled(case: TrainingCase, ctx: CheckContext) -> Twin | None:
    """None for a loop that does not run, or save, without torch.compile."""
    from pytest_gputrain.checks.compile_sides import own_copy, without_compiling
    from pytest_gputrain.checks.session import build_alone

    case = own_copy(case)
    try:
        with without_compiling():
            model = build_alone(case, ctx)
            _train(case, ctx, model, case.optimizer(model))
            tensors = saved_tensors(case.state_dict(model), model)
            return Twin(tensors, differing(tensors, model))
    except Exception:
        return None


def _train(case: TrainingCase, ctx: CheckContext, model: Any, optimizer: Any) -> None:
    from pytest_gputrain.checks.session import draw_batch, seed_for, take_step

    for step in range(STEPS):
        take_step(case, model, optimizer, [draw_batch(case, ctx, step)], seed_for(ctx, step))


def _state(case: TrainingCase, compiled: Any) -> Any:
    """As it is at this moment. Raises CheckFailed where saving raises."""
    import copy

    try:
        return copy.deepcopy(case.state_dict(compiled))
    except Exception as error:
        raise CheckFailed(
            f"state_dict(model) of the compiled model raises {describe(error)}; it has to return what the "
            "loop saves"
        ) from None


def _loaded(
    case: TrainingCase, ctx: CheckContext, saved: Saved, tensors: Tensors, twin: Twin | None, built: Compiled
) -> Any:
    """A fresh model with what was saved; None where there is nothing more to compare."""
    from pytest_gputrain.checks.session import as_if_wrapped, build_model

    fresh = as_if_wrapped(build_model(case, replace(ctx, seed=ctx.seed + APART)))
    saved.missing, saved.unexpected = missing_and_unexpected(fresh, tensors)
    if saved.missing or saved.unexpected:
        if twin is not None and list(twin.tensors) == list(tensors):
            saved.notes.append(
                f"{_EITHER_WAY}the whole model: {len(saved.missing)} of its keys are missing, and "
                f"{len(saved.unexpected)} are others"
            )
            saved.missing, saved.unexpected = [], []
        return None
    saved.stale = differing(tensors, built.holder)
    if saved.stale and twin is not None and twin.stale:
        saved.notes.append(f"{_EITHER_WAY}the weights that train (a moving average?)")
        saved.stale = []
        return None
    try:
        fresh.load_state_dict(tensors)
    except Exception as error:
        saved.refused = describe(error)
        return None
    saved.ignored = differing(tensors, fresh)
    return fresh


def _as_it_is(case: TrainingCase) -> TrainingCase:
    """A copy of the case with what it holds now; itself where that cannot be copied (an iterator, say)."""
    from pytest_gputrain.checks.compile_sides import own_copy

    try:
        return own_copy(case)
    except Exception:
        return case


def _compare(
    case: TrainingCase, ctx: CheckContext, saved: Saved, fresh: Any, built: Compiled, monitor: Any
) -> None:
    """Both evaluate, the fresh one first: what it compiles is compiled by the model itself. Each with a copy
    of the case: a loss may draw from a generator of its own.
    """
    from pytest_gputrain.checks.compile_sides import without_compiling
    from pytest_gputrain.checks.session import draw_batch

    batch = draw_batch(case, ctx, STEPS)
    saved.apart = differing(fresh.state_dict(), built.model)
    with_numbers_of(fresh, built.model)
    before = len(monitor.graphs)
    again = evaluated(_as_it_is(case), ctx, fresh, batch)
    by_itself = len(monitor.graphs) - before
    monitor.phase("original")
    if built.is_wrapped:
        original = evaluated(_as_it_is(case), ctx, built.model, batch)
    else:  # compiled in place, or in regions: calling it is calling what is compiled
        with without_compiling():
            original = evaluated(_as_it_is(case), ctx, built.model, batch)
    if not by_itself:
        saved.by_original = [f"{g.function} at {g.location}" for g in monitor.graphs[before:]]
    if again is None or original is None:
        saved.notes.append("outputs are not compared: loss() raises in evaluation mode")
    else:
        saved.difference, saved.tolerance = furthest(original, again)
