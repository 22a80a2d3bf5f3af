"""When gradients count as equal in ``ddp_parity``, and what is said when they are not."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from pytest_gputrain.checks.averages import Average, wide
from pytest_gputrain.checks.parity_words import Comparison, Deviation, is_factor, told
from pytest_gputrain.checks.result import CheckFailed, CheckUndecided, Figures
from pytest_gputrain.trace.names import Owner

# Relative to the ranks' gradients. Averages are sums in another order, so a few roundings; anything that is
# wrong (a factor, a missing rank) is off by tens of percent.
TOLERANCE = {"float64": 1e-6, "float32": 1e-4, "float16": 1e-2, "bfloat16": 3e-2}
# Relative to the whole gradient: a bias before a norm layer has a gradient of nothing but rounding.
ROUNDING = {"float64": 1e-15, "float32": 1e-6, "float16": 1e-3, "bfloat16": 8e-3}
# An Adam step turns a rounding of a tiny gradient into a change of sign.
UPDATE_TOLERANCE = 0.05
# What sending gradients as bfloat16 costs an element: a rounding on every rank and one in the sum.
COMPRESSION = 2.0**-7
COMPRESSION_UNDERFLOW = 6e-8  # smallest float16
NOT_REPEATABLE = 0.05
_INFINITE = float("inf")


class Verdicts:
    """Compares, remembers, and puts the outcome into words.

    factor: what the average is multiplied with; the world size where a summed loss stays a sum.
    """

    def __init__(self, owned_by: dict[str, Owner], world_size: int, reduction: str) -> None:
        self.owners, self.world_size, self.reduction = owned_by, world_size, reduction
        self.noise: dict[str, float] = {}
        self.factor = 1.0
        self.notes: list[str] = []
        self.lossy: set[str] = set()
        self.compared: set[str] = set()
        self.overflown: set[str] = set()
        self.worst = 0.0

    def add_noise(self, name: str, relative: float) -> None:
        """How much a parameter's gradient differs when nothing differs."""
        self.noise[name] = max(relative, self.noise.get(name, 0.0))

    def check_repeatable(self) -> None:
        """Raises CheckUndecided when most gradients differ from one replay to the next."""
        shaky = [name for name, distance in self.noise.items() if distance > NOT_REPEATABLE]
        if len(shaky) * 2 > len(self.noise):
            raise CheckUndecided(
                f"the same step, batch and seed give gradients that differ by {max(self.noise.values()):.0%} "
                "in one process; draw all randomness from torch's default generator"
            )

    def compare(
        self,
        into: Comparison,
        name: str,
        actual: Any,
        average: Average,
        moment: str,
        *,
        factor: float | None = None,
    ) -> None:
        """One parameter at one moment. factor: of the average, ``self.factor`` unless given."""
        import torch

        expected = average.total[moment].get(name)
        if expected is None and actual is None:
            return
        if expected is None:
            expected = torch.zeros_like(wide(actual))
        magnitude: Any = average.magnitude[moment].get(name, expected)
        seen = torch.zeros_like(expected) if actual is None else wide(actual)
        kind = actual.dtype if actual is not None else expected.dtype
        times = self.factor if factor is None else factor
        if _is_rounding(seen - expected * times, average.norm(moment) * times, kind):
            deviation = None
        else:
            deviation = self._deviation(name, seen, expected * times, magnitude * times, kind, actual is None)
        size = max(float(magnitude.norm()), float(seen.norm()))
        if not size < float("inf"):
            self.overflown.add(name)
        elif size:
            into.compared += 1
            self.compared.add(name)
        if deviation is not None:
            into.wrong.append(replace(deviation, moment=moment))

    def _deviation(
        self, name: str, seen: Any, expected: Any, magnitude: Any, kind: Any, missing: bool
    ) -> Deviation | None:
        import torch

        finite = torch.isfinite(seen) & torch.isfinite(expected)
        if not bool(finite.all()):
            if bool((torch.isfinite(seen) == torch.isfinite(expected)).all()):
                return None  # the loss scaler's business: both overflow in the same places
            if missing:
                words = "got none"
            else:
                words = "is finite where the reference is not" if _finite(seen) else "is NaN or infinite"
            return Deviation(name, float("inf"), 1.0, 1.0, words)
        difference = seen.double() - expected.double()
        scale = max(float(magnitude.double().norm()), float(expected.double().norm()))
        error = float(difference.norm())
        label = str(kind).removeprefix("torch.")
        tolerance = TOLERANCE.get(label, TOLERANCE["float32"]) + 8 * self.noise.get(name, 0.0)
        if error <= tolerance * scale:
            self.worst = max(self.worst, error / scale if scale else 0.0)
            return None
        allowed = COMPRESSION * magnitude.abs() + COMPRESSION_UNDERFLOW
        if not missing and bool((difference.abs() <= allowed).all()):
            self.lossy.add(name)
            return None
        square = float(expected.double().square().sum())
        ratio = float((seen.double() * expected.double()).sum()) / square if square else float("inf")
        norm = float(seen.double().norm())
        rest = float((seen.double() - ratio * expected.double()).norm()) / norm if square and norm else 1.0
        words = "got none" if missing else "" if scale else "is not zero, as the reference is"
        return Deviation(name, error / scale if scale else float("inf"), ratio, rest, words)

    def compare_update(self, into: Comparison, name: str, seen: Any, expected: Any) -> None:
        difference, scale = float((seen - expected).double().norm()), float(expected.double().norm())
        into.compared += bool(scale)
        if scale or difference:
            self.compared.add(name)
        if difference > UPDATE_TOLERANCE * scale:
            error, words = (
                (difference / scale, "") if scale else (float("inf"), "moves, the reference does not")
            )
            into.wrong.append(Deviation(name, error, 1.0, 1.0, words))

    def rescaled(self, comparisons: list[Comparison]) -> list[Comparison]:
        """A summed loss may stay a sum over ranks or be averaged: both are what the case says."""
        wrong = [deviation for comparison in comparisons for deviation in comparison.wrong]
        if self.reduction != "sum" or not wrong:
            return comparisons
        if not all(is_factor(deviation, float(self.world_size)) for deviation in wrong):
            return comparisons
        self.factor = float(self.world_size)
        self.notes.append(
            f"gradients are the sum over {self.world_size} ranks, as loss_reduction 'sum' allows"
        )
        for comparison in comparisons:
            comparison.wrong = []
        return comparisons

    def raise_for(
        self,
        comparisons: list[Comparison],
        *,
        what: str = "gradients",
        at: str = "",
        explain: Callable[[Comparison], str | None] = lambda comparison: None,
    ) -> None:
        """Raises CheckFailed for the first step with deviations. explain: its cause, if that is known."""
        first = next((comparison for comparison in comparisons if comparison.wrong), None)
        if first is None:
            return
        also = [comparison.step for comparison in comparisons if comparison.wrong]
        words, is_explained = told(
            first,
            what,
            at,
            all_steps=len(also) == len(comparisons),
            world_size=self.world_size,
            owners=self.owners,
        )
        if not is_explained and (cause := explain(first)):
            words += f"\n  likely: {cause}"
        raise CheckFailed(
            words,
            {"steps": also, "wrong": sorted(deviation.name for deviation in first.wrong)},
        )

    def figures(self, steps: int) -> Figures:
        """Raises CheckUndecided when nothing was compared: that must never read as a pass."""
        if not self.compared and self.overflown:
            raise CheckUndecided(
                f"every gradient is NaN or infinite in all {steps} steps, so nothing could be compared; give "
                "a loss scaler a smaller first scale"
            )
        if not self.compared:
            raise CheckUndecided("every gradient is zero on all ranks, so nothing could be compared")
        if self.lossy:
            self.notes.append(
                f"{len(self.lossy)} parameters agree to the precision of bfloat16 compression only"
            )
        return {
            "ranks": self.world_size,
            "steps": steps,
            "parameters": len(self.compared),
            "worst": self.worst,
            "notes": self.notes,
        }


def _is_rounding(difference: Any, whole_norm: float, kind: Any) -> bool:
    label = str(kind).removeprefix("torch.")
    return (
        float(difference.double().norm()) <= ROUNDING.get(label, ROUNDING["float32"]) * whole_norm < _INFINITE
    )


def is_rounding_only(name: str, average: Average, moment: str, kind: Any) -> bool:
    """Whether the parameter's whole gradient is rounding: its sign is chance, and so is Adam's update."""
    total = average.total[moment].get(name)
    return total is not None and _is_rounding(total, average.norm(moment), kind)


def _finite(tensor: Any) -> bool:
    import torch

    return bool(torch.isfinite(tensor).all())
