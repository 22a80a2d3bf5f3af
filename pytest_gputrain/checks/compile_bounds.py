"""How far a gradient of compiled code may be from the eager one: what rounding does to this very gradient.

Compiled code adds in another order and, in half precision, rounds less often. What that may come to is
measured on the eager side: the weights are moved by less than their own rounding (that of the type it
computes in, autocast included), and the gradients move with them. A gradient that is a small rest of large
terms moves much, and may.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from pytest_gputrain.checks.averages import wide
from pytest_gputrain.checks.compile_sides import Probe, Snapshot, Tensors

# Beside what was measured: relative to the value itself. TF32 computes with half precision's digits.
BASE = {"float64": 1e-9, "float32": 1e-4, "tf32": 5e-3, "float16": 5e-3, "bfloat16": 2e-2}
EPS = {"float64": 2.0**-52, "float32": 2.0**-23, "tf32": 2.0**-10, "float16": 2.0**-10, "bfloat16": 2.0**-7}
# Two disturbances do not show the worst that another order of sums does.
ROUNDINGS = 4.0
# Of the norm of all gradients: what is smaller is rounding beside the rest (a bias before a norm).
SMALL = 2.0**-20
# In half precision a factor shows long before its size does: rounding has no direction.
FACTOR = 0.25


@dataclass(frozen=True)
class Wrong:
    """A value out of bounds. off: its distance, relative; allowed: what it may be."""

    name: str
    off: float
    allowed: float


@dataclass(frozen=True)
class Bounds:
    """Around one eager probe. others: the step repeated, and from disturbed weights; kind: of ``BASE``."""

    probe: Probe
    others: Sequence[Probe]
    kind: str

    def wrong_loss(self, got: Probe) -> Wrong | None:
        """Also where one side has a loss and the other none, or no number."""
        if self.probe.loss is None or got.loss is None:
            return None if self.probe.loss is got.loss else Wrong("the loss", 1.0, 0.0)
        size = abs(self.probe.loss)
        natural = max(
            (abs(one.loss - self.probe.loss) for one in self.others if one.loss is not None), default=0.0
        )
        allowed = BASE[self.kind] * size + ROUNDINGS * natural + EPS[self.kind]
        off = abs(got.loss - self.probe.loss)
        if off <= allowed:
            return None
        return Wrong("the loss", off / size if size else float("inf"), allowed / size if size else 0.0)

    def wrong_gradients(self, got: Probe) -> list[Wrong]:
        """Worst first."""
        return self._wrong(self.probe.gradients, got.gradients, [one.gradients for one in self.others])

    def wrong_buffers(self, got: Probe) -> list[Wrong]:
        """BatchNorm's running values and the like, as the step left them."""
        mine = {name: one for name, one in self.probe.buffers.items() if one.is_floating_point()}
        theirs = {name: one for name, one in got.buffers.items() if name in mine}
        wrong = self._wrong(mine, theirs, [one.buffers for one in self.others])
        counts = [
            Wrong(name, 1.0, 0.0)
            for name, one in self.probe.buffers.items()
            if name not in mine and name in got.buffers and not torch.equal(one, got.buffers[name])
        ]
        return wrong + counts

    def _wrong(self, expected: Tensors, seen: Tensors, others: list[Tensors]) -> list[Wrong]:
        total = sum(_norm(one) ** 2 for one in expected.values()) ** 0.5
        found = []
        for name in {**expected, **seen}:
            wrong = self._judge(
                name, expected.get(name), seen.get(name), [one.get(name) for one in others], total
            )
            if wrong is not None:
                found.append(wrong)
        return sorted(found, key=lambda one: -one.off)

    def _judge(self, name: str, one: Any, other: Any, moved: list[Any], total: float) -> Wrong | None:
        if one is None or other is None:
            rest = _norm(other if one is None else one)
            return Wrong(name, 1.0, 0.0) if rest > SMALL * total else None
        size, off = _norm(one), _apart(one, other)
        natural = max((_apart(one, each) for each in moved if each is not None), default=0.0)
        allowed = BASE[self.kind] * size + ROUNDINGS * natural + SMALL * total
        if not off <= allowed:  # NaN, too
            return Wrong(name, off / size if size else float("inf"), allowed / size if size else 0.0)
        return self._wrong_factor(name, one, other, moved, total)

    def _wrong_factor(self, name: str, one: Any, other: Any, moved: list[Any], total: float) -> Wrong | None:
        size = _norm(one)
        if EPS[self.kind] < EPS["tf32"] or size <= EPS[self.kind] * total:
            return None
        off = abs(_along(one, other) - 1)
        natural = max((abs(_along(one, each) - 1) for each in moved if each is not None), default=0.0)
        allowed = FACTOR * BASE[self.kind] + ROUNDINGS * natural
        return Wrong(name, off, allowed) if off > allowed else None


def disturbed(start: Snapshot, kind: str, seed: int) -> Snapshot:
    """The same with every weight moved by less than the rounding of that type."""
    generator = torch.Generator().manual_seed(seed)
    eps = EPS[kind]

    def moved(tensor: Any) -> Any:
        if not tensor.is_floating_point():
            return tensor
        noise = torch.rand(tensor.shape, generator=generator).to(tensor.device) * 2 - 1
        return (tensor.double() * (1 + eps * noise.double())).to(tensor.dtype)

    return Snapshot(
        {name: moved(one) for name, one in start.parameters.items()}, start.buffers, start.attributes
    )


@contextlib.contextmanager
def coarsest_type() -> Iterator[list[str]]:
    """Yields a list that at the end holds the type with the fewest digits that was computed in."""
    from torch.utils._python_dispatch import TorchDispatchMode

    seen: set[str] = set()

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(
            self, function: Any, types: Any, args: Any = (), kwargs: Any | None = None
        ) -> Any:
            out = function(*args, **(kwargs or {}))
            for tensor in out if isinstance(out, tuple | list) else (out,):
                if isinstance(tensor, torch.Tensor) and tensor.is_floating_point():
                    seen.add(str(tensor.dtype).removeprefix("torch."))
            return out

    found: list[str] = []
    with Watch():  # type: ignore[no-untyped-call]
        yield found
    if torch.cuda.is_available() and torch.get_float32_matmul_precision() != "highest":
        seen.add("tf32")
    known = [kind for kind in seen if kind in EPS] or ["float32"]
    found.append(max(known, key=lambda kind: EPS[kind]))


def _norm(tensor: Any) -> float:
    return 0.0 if tensor is None else float(wide(tensor).double().norm())


def _apart(one: Any, other: Any) -> float:
    if one.shape != other.shape:
        return float("inf")
    return float((wide(other).double() - wide(one).double()).norm())


def _along(one: Any, other: Any) -> float:
    """How much of ``one`` is in ``other``: 1 where they differ by rounding only, 2 where it is doubled."""
    first, second = wide(one).double().flatten(), wide(other).double().flatten()
    return float(first @ second / (first @ first))
