"""Eager against compiled where both draw random numbers, and not the same ones.

A single step says nothing there. Two things do: in evaluation mode, where dropout rests, gradients have to
agree as ever; and over many draws losses and gradients have to agree in mean and in spread. So a compiled
model that drops nothing, drops the same every time, or drops without scaling is told from one that merely
drops others.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

from pytest_gputrain.checks.compile_bounds import BASE, Bounds
from pytest_gputrain.checks.compile_sides import Probe, Side, Snapshot, Tensors
from pytest_gputrain.checks.result import CheckFailed, Figures
from pytest_gputrain.compile.draws import Difference, differ

FEWEST, MOST = 16, 64
SECONDS = 6.0
# Of the norm of all gradients: the projections of smaller ones are noise.
SMALL = 1e-4
_LOSS = "the loss"


def compare_quietly(sides: Sequence[Side], other: Side, batch: Any, seed: int, kind: str) -> str | None:
    """Gradients in evaluation mode. sides: eager, the first undisturbed; other: compiled.

    Returns a note where nothing could be compared. Raises CheckFailed.
    """
    return _compare(sides, other, seed, kind, lambda side, seed: side.quiet(batch, seed))


def compare_evaluation(sides: Sequence[Side], other: Side, batch: Any, seed: int, kind: str) -> str | None:
    """What the model gives in evaluation, without gradients: a graph of its own. Otherwise the same."""
    shows = other.shows_outputs
    return _compare(sides, other, seed, kind, lambda side, seed: side.outputs(batch, seed, hooks=shows))


def _compare(
    sides: Sequence[Side], other: Side, seed: int, kind: str, asked: Callable[[Side, int], Probe]
) -> str | None:
    try:
        probes = [asked(side, seed) for side in sides]
        again = asked(sides[0], seed + 1)
    except Exception as error:  # a loss that needs training mode, as torchvision's detectors do
        return f"the loss cannot be computed in evaluation mode ({type(error).__name__})"
    bounds = Bounds(probes[0], probes[1:], kind)
    if bounds.wrong_loss(again) or bounds.wrong_gradients(again):
        return "evaluation mode draws random numbers, too"
    got = asked(other, seed)
    wrong = bounds.wrong_loss(got)
    found = ([wrong] if wrong else []) + bounds.wrong_gradients(got)
    if found:
        worst = found[0]
        raise CheckFailed(
            f"compiled computes something else in evaluation mode, where dropout rests: {worst.name} is off "
            f"by {worst.off:.2%}, where rounding explains {worst.allowed:.2%}",
            {"wrong": [one.name for one in found]},
        )
    return None


def compare_draws(side: Side, other: Side, start: Snapshot, batch: Any, seed: int, kind: str) -> Figures:
    """Losses and gradients over many seeds. Raises CheckFailed for another mean or another spread."""
    began = time.monotonic()
    first = _numbers(side, start, batch, [seed], None)
    number = int(SECONDS / 3 / max(time.monotonic() - began, 1e-4))
    number = max(FEWEST, min(MOST, number))
    seeds = [range(seed + place * MOST, seed + place * MOST + number) for place in (1, 2, 3)]
    mean = _mean_gradient(side, start, batch, seeds[0])
    eager = _numbers(side, start, batch, seeds[1], mean)
    compiled = _numbers(other, start, batch, seeds[2], mean)
    del first
    # Projections on gradients of disturbed runs: half precision alone moves them by about this.
    found = {
        name: differ(values, compiled[name], BASE[kind]) for name, values in eager.items() if name in compiled
    }
    real = {name: one for name, one in found.items() if one.real}
    if real:
        raise CheckFailed(_in_words(real, number), {"wrong": sorted(real)})
    return {"draws": number, "widest draw": max((one.errors for one in found.values()), default=0.0)}


def _in_words(real: dict[str, Difference], number: int) -> str:
    name = _LOSS if _LOSS in real else max(real, key=lambda key: real[key].errors)
    worst = real[name]
    what = name if name == _LOSS else f"the gradient of {name}"
    if worst.spread < 1e-2:
        said = f"{what} is the same for every seed under compile, and varies in eager"
        likely = (
            "dropout does not act under compile (evaluation mode), or its mask became a constant of the graph"
        )
    elif worst.spread > 1e2:
        said = f"{what} varies with the seed under compile, and is the same for every seed in eager"
        likely = "dropout acts under compile only: the eager model was left in evaluation mode"
    else:
        said = (
            f"over {number} seeds {what} is {worst.other:.4g} in the mean under compile, {worst.one:.4g} in "
            "eager "
            f"({worst.errors:.0f} standard errors apart; spread {worst.spread:.2f} times as large)"
        )
        likely = "dropout with another probability or without its scale, or a backward that is another"
    return f"compiled differs by more than its random numbers: {said}\n  likely: {likely}"


def _mean_gradient(side: Side, start: Snapshot, batch: Any, seeds: Sequence[int]) -> Tensors:
    total: Tensors = {}
    for seed in seeds:
        for name, gradient in _probe(side, start, batch, seed).gradients.items():
            if gradient is not None:
                total[name] = total[name] + gradient.double() if name in total else gradient.double()
    return {name: one / len(seeds) for name, one in total.items() if not one.is_complex()}


def _numbers(
    side: Side, start: Snapshot, batch: Any, seeds: Sequence[int], mean: Tensors | None
) -> dict[str, list[float]]:
    """By name, a number a seed: the loss, and each gradient along the mean one."""
    sizes = {name: float((one * one).sum()) for name, one in (mean or {}).items()}
    total = sum(sizes.values())
    kept = {name: size for name, size in sizes.items() if size > SMALL**2 * total}
    found: dict[str, list[float]] = {}
    for seed in seeds:
        probe = _probe(side, start, batch, seed)
        if probe.loss is not None:
            found.setdefault(_LOSS, []).append(probe.loss)
        for name, size in kept.items():
            gradient = probe.gradients.get(name)
            along = 0.0 if gradient is None else float((gradient.double() * (mean or {})[name]).sum()) / size
            found.setdefault(name, []).append(along)
    return found


def _probe(side: Side, start: Snapshot, batch: Any, seed: int) -> Probe:
    start.restore(side.bare)
    return side.probe(batch, seed)
