"""Gradients of several ranks as one, and how far two gradients are apart."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pytest_gputrain.trace.steps import MOMENTS

Tensors = dict[str, Any]


class Average:
    """The weighted sum of the ranks' gradients, and of their sizes, at each moment."""

    def __init__(self, weights: Sequence[float]) -> None:
        self.weights = list(weights)
        self.total: dict[str, Tensors] = {moment: {} for moment in MOMENTS}
        self.magnitude: dict[str, Tensors] = {moment: {} for moment in MOMENTS}
        self._added = 0
        self._norms: dict[str, float] = {}

    def add(self, gradients: dict[str, Tensors]) -> None:
        """The next rank's gradients."""
        weight = self.weights[self._added]
        self._added += 1
        self._norms.clear()
        for moment in MOMENTS:
            for name, gradient in gradients[moment].items():
                if gradient is None:
                    continue  # a parameter that this rank does not use counts as zero
                value = wide(gradient)
                _accumulate(self.total[moment], name, value * weight)
                _accumulate(self.magnitude[moment], name, value.abs() * weight)

    def norm(self, moment: str) -> float:
        """Of the whole gradient at one moment: what rounding is to be related to."""
        if moment not in self._norms:
            squares = [float(value.double().square().sum()) for value in self.total[moment].values()]
            self._norms[moment] = sum(squares) ** 0.5
        return self._norms[moment]

    def at(self, name: str, moment: str, *, like: Any) -> Any:
        total = self.total[moment].get(name)
        if total is None:
            return None
        import torch

        narrow = torch.view_as_complex(total) if like.is_complex() else total
        return narrow.to(like.dtype)


def wide(tensor: Any) -> Any:
    """A gradient in a type that sums of halves do not lose digits in."""
    import torch

    real = torch.view_as_real(tensor) if tensor.is_complex() else tensor
    return real if real.dtype == torch.float64 else real.float()


def _accumulate(into: Tensors, name: str, value: Any) -> None:
    into[name] = into[name] + value if name in into else value


def distance(one: Any, other: Any) -> float:
    """Norm of the difference over the norm of the first; a gradient on one side only is 1, unless zero."""
    import torch

    if one is None or other is None:
        present = other if one is None else one
        return 0.0 if present is None or not bool((present != 0).any()) else 1.0
    if torch.equal(one, other):
        return 0.0
    wanted, got = wide(one).double(), wide(other).double()
    if not bool((torch.isfinite(wanted) & torch.isfinite(got)).all()):
        return 0.0 if bool((torch.isfinite(wanted) == torch.isfinite(got)).all()) else float("inf")
    size = float(wanted.norm())
    return float((got - wanted).norm()) / size if size else float("inf")
