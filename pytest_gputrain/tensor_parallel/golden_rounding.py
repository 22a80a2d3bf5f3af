"""How much of a difference the reference's own precision explains: its distance from itself in float64.

Only asked where a difference is more than the fixed tolerance, since it needs a second reference.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch

from pytest_gputrain.case import pytree
from pytest_gputrain.tensor_parallel import golden_difference as apart
from pytest_gputrain.tensor_parallel.golden_model import parameters_of
from pytest_gputrain.tensor_parallel.golden_outputs import Answer, ask

if TYPE_CHECKING:
    from pytest_gputrain.tensor_parallel.golden_pair import Pair

# Ranks round their partial sums once more, and differently; a bug is hundreds of times the rounding.
FACTOR = 4.0
# However ill-conditioned a model is, a difference of this share of the largest output is none of rounding's.
MOST = {"float64": 1e-8, "float32": 1e-3, "float16": 2e-2, "bfloat16": 1e-1}


def gradient_rounding(pair: Pair, batch: Any) -> dict[str, float]:
    """By parameter, the norm of what a short type's rounding does to its gradient.

    Empty where all is computed in float32 or float64, and where the reference's code does not run in float32.
    The reference has its gradients already.
    """
    kinds = {p.dtype for p in pair.reference.parameters() if p.is_floating_point()}
    if not kinds & {*apart.SHORT} and pair.short is None:
        return {}
    with pair.world.alone(), without_autocast():
        try:
            exact = copy.deepcopy(pair.reference).float()
            exact.zero_grad(set_to_none=True)
            answer = ask(pair.case, exact, pytree.map_tensors(_single, batch), pair.seed, gradients=True)
        except Exception:
            return {}
    if answer.kinds & {*apart.SHORT}:  # it casts by itself
        return {}
    wanted = {name: p.grad for name, p in parameters_of(exact).items()}
    got = {name: p.grad for name, p in parameters_of(pair.reference).items()}
    return {
        name: apart.norm(got[name].float() - grad.float())
        for name, grad in wanted.items()
        if grad is not None and got.get(name) is not None
    }


@contextlib.contextmanager
def without_autocast() -> Iterator[None]:
    """In it, nobody's autocast casts."""
    enter: Any = torch.autocast.__enter__

    def entering(self: Any) -> Any:
        self._enabled = False
        return enter(self)

    torch.autocast.__enter__ = entering  # type: ignore[method-assign]
    try:
        yield
    finally:
        torch.autocast.__enter__ = enter  # type: ignore[method-assign]


def _single(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.float() if tensor.is_floating_point() else tensor


def output_rounding(pair: Pair, batch: Any, label: str) -> float:
    """The absolute tolerance that the reference's own rounding of this output explains; 0.0 if unknown."""
    exact = _exactly(pair, batch)
    with pair.world.alone():
        answer = ask(pair.case, pair.reference, batch, pair.seed)
    if exact is None or len(exact.outputs) != len(answer.outputs):
        return 0.0
    explained = 0.0
    for (_, rounded), (_, wanted) in zip(answer.outputs, exact.outputs, strict=True):
        if rounded.shape == wanted.shape and rounded.numel():
            off = float((rounded.double() - wanted.double()).abs().max())
            most = apart.tolerance(MOST, pair.computes_in(rounded.dtype)) * float(wanted.abs().max())
            explained = max(explained, min(FACTOR * off, most))
    return explained if explained == explained else 0.0


def _exactly(pair: Pair, batch: Any) -> Answer | None:
    """The reference in float64; None where its code does not run in that."""
    with pair.world.alone():
        try:
            exact = copy.deepcopy(pair.reference).double()
            return ask(pair.case, exact, pytree.map_tensors(_double, batch), pair.seed)
        except Exception:
            return None


def _double(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.double() if tensor.is_floating_point() else tensor
