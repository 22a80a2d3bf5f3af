"""Gradients of the parallel model, whoever sharded it, against the reference's, each where it lies."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from pytest_gputrain.tensor_parallel import golden_difference as apart
from pytest_gputrain.tensor_parallel.golden_factor import factor
from pytest_gputrain.tensor_parallel.golden_model import parameters_of
from pytest_gputrain.tensor_parallel.golden_pair import Pair
from pytest_gputrain.tensor_parallel.golden_pieces import KINKS, elsewhere, in_source, parts, square
from pytest_gputrain.tensor_parallel.golden_reasons import reason
from pytest_gputrain.tensor_parallel.golden_rounding import FACTOR
from pytest_gputrain.tensor_parallel.records import Difference
from pytest_gputrain.tensor_parallel.records_backward import GradientRecord
from pytest_gputrain.trace.names import owners

Given = dict[str, Any]
KINK = 10.0  # a row that is wrong altogether makes more than so many times the tolerance
FACTOR_OF_ONE = 1e-4  # no further off than this, a gradient is the right one
_MOST_EXPLAINED = 8  # wrong parameters that are gathered to say why; the first ones say it


@dataclass(frozen=True)
class Gradients:
    """The reference's, by name in the order in which backward reaches them.

    total: norm of all of them. rounding: by name, the norm of what a short type's rounding does to them.
    """

    by_name: dict[str, Any]
    layers: dict[str, str]
    total: float
    rounding: dict[str, float] = field(default_factory=dict)

    @classmethod
    def of(cls, model: nn.Module, order: list[str]) -> Gradients:
        parameters = parameters_of(model)
        found = {name: parameters[name].grad for name in dict.fromkeys(order) if name in parameters}
        found |= {name: p.grad for name, p in parameters.items() if name not in found and p.requires_grad}
        return cls.from_named(found, {name: owner.path for name, owner in owners(model).items()})

    @classmethod
    def from_named(cls, by_name: dict[str, Any], layers: dict[str, str]) -> Gradients:
        norms = [apart.norm(grad) for grad in by_name.values() if grad is not None]
        return cls(by_name, layers, sum(size * size for size in norms) ** 0.5)


@dataclass(frozen=True)
class _Seen:
    """What one rank has of one gradient: error by the reference's norm, and where it is largest.

    elsewhere: the error without the few rows, or columns, where it is largest. factor: see `golden_factor`.
    """

    relative: float
    difference: Difference | None
    absolute: float
    elsewhere: float
    factor: float | None


def compare_gradients(pair: Pair, wanted: Gradients, given: Given | None = None) -> list[GradientRecord]:
    """Records of all trainable parameters found in the parallel model, in backward's order; collective.

    given: by name, the parallel model's gradients on this process; None are those that it has now.
    """
    got = parallel_gradients(pair, given)
    sizes = {name: apart.norm(grad) if grad is not None else 0.0 for name, grad in wanted.by_name.items()}
    seen: dict[int, dict[str, _Seen]] = {
        rank: {
            name: _compare(pair, name, wanted, sizes[name], got[rank], rank)
            for name in wanted.by_name
            if pair.weights.holders(name)
        }
        for rank in pair.world.held
    }
    by_rank = pair.world.merged(seen)
    missing = pair.world.merged({r: sorted(n for n, grad in got[r].items() if grad is None) for r in got})
    records = [
        _record(pair, name, wanted, sizes[name], [one[name] for one in by_rank], missing)
        for name in wanted.by_name
        if name in by_rank[0]
    ]
    return _explained(pair, wanted, records, got)


def parallel_gradients(pair: Pair, given: Given | None = None) -> dict[int, dict[str, Any]]:
    """By rank held, every parallel parameter's gradient; a DTensor's is gathered. None: there is none."""
    parameters = parameters_of(pair.parallel)
    own = {name: parameter.grad for name, parameter in parameters.items()} if given is None else given
    names = list(pair.weights.held)
    here = {name: own.get(name) is not None for name in names}
    by_rank = pair.world.merged(dict.fromkeys(pair.world.held, here))
    got: dict[int, dict[str, Any]] = {rank: {} for rank in pair.world.held}
    for name in names:
        # Gathering is a collective: not unless every rank has something to give.
        everywhere = all(one[name] for one in by_rank)
        whole = pair.world.whole(own[name]) if everywhere else {}
        if not everywhere and here[name]:
            whole = pair.world.pieces(own[name])
        for rank in pair.world.held:
            got[rank][name] = whole.get(rank)
    return got


def _compare(
    pair: Pair, name: str, wanted: Gradients, size: float, got: Mapping[str, Any], rank: int
) -> _Seen:
    golden = wanted.by_name[name]
    if golden is None:
        golden = torch.zeros_like(parameters_of(pair.reference)[name])
    found = parts(pair, name, golden, got, rank)
    squares, rest, largest = 0.0, 0.0, None
    for one, other, layout, start, _ in found:
        difference = apart.difference(one, other.to(one.device), rank)
        squares += square(one, other)
        if difference.relative > 0:
            rest += elsewhere(one, other)
        if largest is None or difference.largest > largest.largest:
            largest = replace(difference, index=in_source(difference.index, layout, start))
    absolute = squares**0.5
    if not found:  # nothing of it here, or no gradient: as good as zero
        absolute = size if any(got.get(h) is None for h in pair.weights.on_rank(name, rank)) else 0.0
    relative = absolute / size if size else (0.0 if not absolute else float("inf"))
    # Looked for only where it is more than rounding: it costs another pass.
    by = 1.0 if relative <= FACTOR_OF_ONE else factor((one, other) for one, other, *_ in found)
    return _Seen(relative, largest, absolute, rest**0.5 if found else absolute, by)


def _record(
    pair: Pair,
    name: str,
    wanted: Gradients,
    size: float,
    seen: list[_Seen],
    missing: list[list[str]],
) -> GradientRecord:
    golden = wanted.by_name[name]
    kind = next(record.kind for record in pair.weights.records if record.name == name)
    dtype = pair.computes_in(parameters_of(pair.reference)[name].dtype)
    allowed = apart.tolerance(apart.GRADIENT_TOLERANCE, dtype)
    # Below this the difference is rounding beside what the whole backward adds up.
    floor = apart.NEGLIGIBLE * torch.finfo(dtype).eps * wanted.total
    worst = max(seen, key=lambda one: (one.absolute, one.relative))
    negligible = size <= floor
    limit = floor if negligible else max(allowed * size, floor)
    if name in wanted.rounding:
        # A short type's rounding is no small share of a gradient, and another one for each parameter.
        limit = max(FACTOR * wanted.rounding[name], torch.finfo(dtype).eps * size)
        allowed, negligible = (limit / size if size else 0.0), limit >= size
    wrong = not worst.absolute <= limit
    if wrong and worst.absolute <= KINK * limit and all(one.elsewhere <= limit for one in seen):
        wrong = False
        pair.notes.append(
            f"{name}.grad is off by {percent(worst.relative)} in {KINKS} rows or less and right elsewhere: a "
            "unit at the kink of its activation (a ReLU at zero), which rounding turns on or off"
        )
    problem = None
    if wrong:
        problem = _problem(pair, name, golden, worst, missing)
    return GradientRecord(
        name=name,
        layer=wanted.layers.get(name, name.rpartition(".")[0]),
        kind=kind,
        relative=worst.relative,
        tolerance=allowed,
        by_rank=tuple(one.relative for one in seen),
        difference=worst.difference,
        negligible=negligible,
        problem=problem,
        factors=tuple(one.factor for one in seen),
    )


def _problem(pair: Pair, name: str, golden: Any, worst: _Seen, missing: list[list[str]]) -> str:
    without = [
        rank
        for rank, names in enumerate(missing)
        if any(holder in names for holder in pair.weights.on_rank(name, rank))
    ]
    if without:
        where = "any rank" if len(without) == len(missing) else f"rank {', '.join(map(str, without))}"
        return f"{name} has no gradient on {where}"
    if golden is None or worst.relative == float("inf"):
        return f"{name}.grad is not zero or not finite, unlike the reference's"
    return f"{name}.grad is off by {percent(worst.relative)}"


def percent(relative: float) -> str:
    """57 %, 0.3 %, 0.02 %: two digits that count."""
    if relative >= 10:
        return f"a factor of {relative:.3g}"
    return f"{100 * relative:.0f} %" if relative >= 0.1 else f"{100 * relative:.2g} %"


def _explained(
    pair: Pair, wanted: Gradients, records: list[GradientRecord], got: dict[int, dict[str, Any]]
) -> list[GradientRecord]:
    """The first wrong ones with what explains them; collective."""
    left = _MOST_EXPLAINED
    explained = []
    for record in records:
        golden = wanted.by_name[record.name]
        if record.problem and left and golden is not None:
            left -= 1
            own = {rank: parts(pair, record.name, golden, got[rank], rank) for rank in pair.world.held}
            record = replace(record, cause=reason(pair, record, golden, own))
        explained.append(record)
    return explained
