"""Gradients that are off by no more than the reference's are when its weights change in their last digit.

A neuron that is cut off at zero (relu) is on for one rounding and off for another: a gradient of OPT-125M may
so be off by a little more than 1e-4 of its norm in a plan that is right.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from pytest_gputrain.tensor_parallel import golden_difference as apart
from pytest_gputrain.tensor_parallel.golden_model import parameters_of
from pytest_gputrain.tensor_parallel.golden_outputs import ask
from pytest_gputrain.tensor_parallel.golden_rounding import FACTOR, MOST
from pytest_gputrain.tensor_parallel.records_backward import GradientRecord

if TYPE_CHECKING:
    from pytest_gputrain.tensor_parallel.golden_gradients import Gradients
    from pytest_gputrain.tensor_parallel.golden_pair import Pair


Computed = Callable[[torch.dtype], torch.dtype]


def without_rounding(
    pair: Pair, batch: Any, wanted: Gradients, records: list[GradientRecord]
) -> list[GradientRecord]:
    """The records, without problems that rounding explains; collective.

    Not asked where any gradient is further off than rounding ever is: that is a bug, and so is the rest.
    """
    wrong = [record for record in records if record.problem]
    parameters = parameters_of(pair.reference)
    most = {one.name: apart.tolerance(MOST, pair.computes_in(parameters[one.name].dtype)) for one in wrong}
    if not wrong or pair.world.simulated or any(one.relative > most[one.name] for one in wrong):
        return records
    own = FACTOR * _last_digit(
        pair, batch, wanted, [record.name for record in records if not record.negligible]
    )
    return [
        replace(record, problem=None, cause="", tolerance=min(own, most[record.name]))
        if record.problem and record.relative <= min(own, most[record.name])
        else record
        for record in records
    ]


def _last_digit(pair: Pair, batch: Any, wanted: Gradients, names: Sequence[str]) -> float:
    """The largest relative change of a gradient as the reference's weights change in their last digit.

    On one rank, which has the memory for it, for all; collective.
    """
    change = _changed(pair, batch, wanted, names) if 0 in pair.world.held else 0.0
    return max(pair.world.merged(dict.fromkeys(pair.world.held, change)))


def _changed(pair: Pair, batch: Any, wanted: Gradients, names: Sequence[str]) -> float:
    model = pair.reference
    parameters = parameters_of(model)
    kept = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    try:
        change_last_digits(parameters.values(), pair.seed, pair.computes_in)
        model.zero_grad(set_to_none=True)
        ask(pair.case, model, batch, pair.seed, gradients=True)
        found = {name: parameter.grad for name, parameter in parameters.items()}
    finally:
        model.zero_grad(set_to_none=True)
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.copy_(kept[name])
    pairs = [(wanted.by_name[name], found[name]) for name in names]
    return max((apart.difference(*one).relative for one in pairs if _both(one)), default=0.0)


def change_last_digits(parameters: Iterable[torch.Tensor], seed: int, computed: Computed) -> None:
    """In place, by rounding's size and at random; no parameter that is not floating.

    computed: the type that a parameter of a type is computed in, whose last digit it is.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in parameters:
            if parameter.is_floating_point():
                noise = torch.randn(parameter.shape, generator=generator).to(parameter.device)
                eps = torch.finfo(computed(parameter.dtype)).eps
                parameter.add_(parameter * (eps * noise).to(parameter.dtype))


class LastDigits:
    """Weights that are other ones in their last digit while gradients are taken of them.

    changed: whether they are now.
    """

    def __init__(self, parameters: Sequence[torch.Tensor], seed: int, computed: Computed) -> None:
        self._parameters, self._seed, self._computed = parameters, seed, computed
        self._kept: list[torch.Tensor] = []

    @property
    def changed(self) -> bool:
        return bool(self._kept)

    def change(self) -> None:
        """In another way each time. Not while they are changed already."""
        if not self._kept:
            self._kept = [parameter.detach().clone() for parameter in self._parameters]
            self._seed += 1
            change_last_digits(self._parameters, self._seed, self._computed)

    def put_back(self) -> None:
        with torch.no_grad():
            for parameter, kept in zip(self._parameters, self._kept, strict=False):
                parameter.copy_(kept)
        self._kept = []


def _both(pair: tuple[Any, Any]) -> bool:
    return pair[0] is not None and pair[1] is not None
