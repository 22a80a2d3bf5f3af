"""Tied weights: one parameter that several modules have, before and after each of them is sharded."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True)
class Tie:
    """One parameter's places, each (module name, parameter name), in the model's order."""

    places: tuple[tuple[str, str], ...]

    def names(self) -> list[str]:
        return [f"{module}.{name}" if module else name for module, name in self.places]


def find(model: nn.Module) -> list[Tie]:
    """Every parameter that more than one module has."""
    places: dict[int, list[tuple[str, str]]] = {}
    for module_name, module in model.named_modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                places.setdefault(id(parameter), []).append((module_name, name))
    return [Tie(tuple(found)) for found in places.values() if len(found) > 1]


def restore(model: nn.Module, ties: list[Tie]) -> None:
    """Give all places of each tie the first one's parameter again."""
    for tie in ties:
        (first, name), *others = tie.places
        shared = model.get_submodule(first)._parameters[name]
        for module_name, other in others:
            model.get_submodule(module_name)._parameters[other] = shared
