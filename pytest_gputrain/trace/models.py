"""Finds the models that a script trains, without being told: by the parameters that an optimizer holds.

The script's modules are looked up among the objects of the process, once for each optimizer with parameters
not seen before. Models are held weakly: what the script lets go of goes.
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from pytest_gputrain.trace.gradients import GradTracer
from pytest_gputrain.trace.names import canonical_name, inner_model, named_parameters


class TracedModel:
    """One model of the script and the gradients that arrive at it."""

    def __init__(self, model: Any, label: str, on_arrival: Callable[[Any], None]) -> None:
        self.label = label
        self.gradients = GradTracer(model, weak=True, on_arrival=on_arrival)
        self.num_backwards = 0
        """How many backward passes the rank had done when this model was last reported."""

    @property
    def alive(self) -> bool:
        """Whether the script still has it."""
        return self.gradients.model is not None

    def parameters(self) -> dict[str, Any]:
        """Its parameters now, by name."""
        model = self.gradients.model
        return {} if model is None else named_parameters(model)

    def end_step(self, parameters: dict[str, Any]) -> tuple[int, list[str]]:
        """(how many gradients arrived, names of the trainable ones that did not) since the last call."""
        came = {name: p for name, p in self.gradients.refresh(parameters).items() if p.grad is not None}
        arrived = self.gradients.arrived | set(came)
        if not arrived:  # some wrappers (FSDP's flat parameters) assign gradients without passing any hook
            arrived = {name for name, p in parameters.items() if p.grad is not None}
        trainable = [name for name, p in parameters.items() if p.requires_grad]
        missing = [name for name in trainable if name not in arrived]
        self.gradients.step()
        return len(trainable) - len(missing), missing


class Models:
    """All models found so far. ``on_new`` is called with each, as the script built it."""

    def __init__(self, on_new: Callable[[Any], None], on_arrival: Callable[[Any], None]) -> None:
        self._on_new, self._on_arrival = on_new, on_arrival
        self._found: list[TracedModel] = []
        self._seen: weakref.WeakSet[Any] = weakref.WeakSet()
        self._known: dict[int, weakref.ref[Any]] = {}
        self.names: weakref.WeakKeyDictionary[Any, str] = weakref.WeakKeyDictionary()
        """Of modules that hold parameters, by module."""

    def __iter__(self) -> Iterator[TracedModel]:
        self._found = [model for model in self._found if model.alive]
        return iter(self._found)

    def holding(self, parameters: Iterable[Any]) -> None:
        """Finds the models that these parameters belong to."""
        wanted = {id(parameter) for parameter in parameters if not self._is_known(parameter)}
        if wanted:
            for root in roots():
                if not ids_of(root).isdisjoint(wanted):
                    self.meet(root)

    def all_of_the_script(self) -> None:
        """Finds every model, for scripts that have no optimizer."""
        for root in roots():
            if ids_of(root):
                self.meet(root)

    def meet(self, root: Any) -> None:
        """Begins to trace a model that has something to train; wrapped, or met again, it is the same."""
        if root in self._seen:
            return
        self._seen.add(root)
        model = inner_model(root)
        if any(p.requires_grad and not self._is_known(p) for p in model.parameters()):
            self._on_new(model)
            self._remember(model)
            label = type(model).__name__
            earlier = sum(other.label.partition("#")[0] == label for other in self._found)
            traced = TracedModel(model, f"{label}#{earlier + 1}" if earlier else label, self._on_arrival)
            traced.gradients.__enter__()
            self._found.append(traced)

    def close(self) -> None:
        """Takes every hook off again."""
        for traced in self._found:
            traced.gradients.__exit__(None, None, None)
        self._found.clear()

    def _remember(self, model: Any) -> None:
        for name, module in model.named_modules():
            self._seen.add(module)
            if any(True for _ in module.parameters()):
                self.names[module] = canonical_name(name) or type(model).__name__
        for parameter in model.parameters():
            self._known[id(parameter)] = weakref.ref(parameter)

    def _is_known(self, parameter: Any) -> bool:
        reference = self._known.get(id(parameter))
        return reference is not None and reference() is parameter


def ids_of(module: Any) -> set[int]:
    """The ids of a module's parameters; empty for one that is not made yet or is only named a module."""
    try:
        hash(module)
        return {id(parameter) for parameter in module.parameters()}
    except Exception:  # what the script does not train is none of its faults
        return set()


def roots() -> list[Any]:
    """Modules of the process that are part of no other module."""
    from torch import nn

    # By type() and not isinstance(): that would wake lazy objects of other libraries up.
    modules = [found for found in gc.get_objects() if issubclass(type(found), nn.Module)]
    children = {id(child) for module in modules for child in vars(module).get("_modules", {}).values()}
    return [module for module in modules if id(module) not in children]
