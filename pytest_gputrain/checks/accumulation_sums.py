"""Gradients of micro-batches joined with weights, compared with what a step had, and taken apart again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pytest_gputrain.checks.accumulation_window import Gradients

# Relative, and by what a gradient may be off beside the whole model's: a bias before a norm layer has a
# gradient of nothing but rounding. By dtype of the gradients.
FLOOR = {"float64": 1e-6, "float32": 1e-4, "float16": 1e-2, "bfloat16": 3e-2}
SLACK = {"float64": 1e-12, "float32": 1e-6, "float16": 1e-3, "bfloat16": 8e-3}
# Times the rounding that was measured on the case itself: sums round in other places, not more coarsely.
ROUNDINGS = 16


@dataclass(frozen=True)
class Tolerance:
    """relative: of a parameter's gradient; slack: of the whole model's gradient."""

    relative: float
    slack: float

    @classmethod
    def measured(cls, rounding: float, dtype: str) -> Tolerance:
        relative = FLOOR.get(dtype, FLOOR["float32"])
        slack = SLACK.get(dtype, SLACK["float32"])
        return cls(max(relative, ROUNDINGS * rounding), max(slack, ROUNDINGS / 2 * rounding))


@dataclass(frozen=True)
class Gap:
    """error: the worst parameter's, relative; ratio: the factor that explains most; rest: what it leaves."""

    error: float
    wrong: tuple[str, ...]
    compared: int
    ratio: float
    rest: float

    @property
    def closed(self) -> bool:
        return not self.wrong

    @property
    def is_factor(self) -> bool:
        return self.rest < 1e-3


def joined(parts: Sequence[Gradients], weights: Sequence[float], times: float = 1.0) -> Gradients:
    """The sum of the parts' gradients, each with its weight; None where no part has one."""
    total: Gradients = {}
    for part, weight in zip(parts, weights, strict=True):
        for name, gradient in part.items():
            if gradient is None:
                total.setdefault(name, None)
            else:
                share = gradient.double() * (weight * times)
                before = total.get(name)
                total[name] = share if before is None else before + share
    return total


def sizes(parts: Sequence[Gradients], weights: Sequence[float], times: float = 1.0) -> dict[str, float]:
    """By parameter, what its gradient's rounding is to be related to, were all parts to cancel out."""
    found: dict[str, float] = {}
    for part, weight in zip(parts, weights, strict=True):
        for name, gradient in part.items():
            if gradient is not None:
                found[name] = found.get(name, 0.0) + float(gradient.double().norm()) * abs(weight * times)
    return found


def gap(seen: Gradients, expected: Gradients, tolerance: Tolerance, size: dict[str, float]) -> Gap:
    """How far ``seen`` is from ``expected``, over all parameters that either has."""
    names = [name for name in dict.fromkeys([*expected, *seen]) if _has(seen, name) or _has(expected, name)]
    whole = max(norm(expected), norm(seen))
    worst, wrong, compared = 0.0, [], 0
    for name in names:
        one, other = _value(seen, name, expected), _value(expected, name, seen)
        scale = max(float(other.norm()), min(size.get(name, 0.0), whole))
        compared += bool(scale) or bool(one.any())
        distance = float((one - other).norm())
        if distance > tolerance.relative * scale + tolerance.slack * whole or distance != distance:
            wrong.append(name)
        elif scale and distance <= tolerance.relative * scale:
            worst = max(worst, distance / scale)
    product = dot(seen, expected)
    square = dot(expected, expected)
    ratio = product / square if square else float("inf") if norm(seen) else 1.0
    left = max(0.0, dot(seen, seen) - 2 * ratio * product + ratio * ratio * square) if square else 1.0
    rest = (left / dot(seen, seen)) ** 0.5 if square and norm(seen) else float(bool(wrong))
    return Gap(worst, tuple(wrong), compared, ratio, rest)


def weights_in(seen: Gradients, parts: Sequence[Gradients]) -> tuple[list[float], float]:
    """The weights with which the parts make up ``seen`` best, and what they leave of it, relative."""
    import torch

    gram = torch.tensor([[dot(one, other) for other in parts] for one in parts], dtype=torch.float64)
    side = torch.tensor([dot(seen, one) for one in parts], dtype=torch.float64)
    weights = torch.linalg.lstsq(gram, side[:, None], driver="gelsd").solution[:, 0].tolist()
    left = norm(joined([seen, *parts], [1.0, *(-weight for weight in weights)]))
    size = norm(seen)
    return weights, left / size if size else float(bool(left))


def norm(gradients: Gradients) -> float:
    return float(dot(gradients, gradients) ** 0.5)


def dot(one: Gradients, other: Gradients) -> float:
    return sum(
        float((value.double() * other[name].double()).sum())
        for name, value in one.items()
        if value is not None and other.get(name) is not None
    )


def _has(gradients: Gradients, name: str) -> bool:
    return gradients.get(name) is not None


def _value(gradients: Gradients, name: str, other: Gradients) -> Any:
    import torch

    value = gradients.get(name)
    return torch.zeros_like(other[name]).double() if value is None else value.double()
