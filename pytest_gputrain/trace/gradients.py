"""Which parameters got a gradient, and in which order, without changing any of them.

"Arrived" means accumulated into ``parameter.grad`` by autograd (``register_post_accumulate_grad_hook``).
Does not see gradients that are assigned by hand to ``parameter.grad``.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from types import TracebackType
from typing import Any

from pytest_gputrain.trace.names import Owner, named_parameters, owners

_NAMED_IN_MESSAGE = 10


class GradTracer:
    """Context manager that records the gradients arriving at a model's trainable parameters.

    The model may be wrapped (DistributedDataParallel, torch.compile); names are the inner model's, and a
    tied parameter has its first name. What is recorded adds up until ``step()`` begins a new step;
    ``arrived``, ``missing`` and ``order`` speak of the current step, ``arrived_ever`` and
    ``missing_ever`` of all of them. Entering it again, while it is entered, adds no second hook.

    weak: does not keep the model alive; without it, ``model`` is None and nothing is trainable.
    on_arrival: called with each parameter whose gradient arrives.
    """

    def __init__(
        self, model: Any, *, weak: bool = False, on_arrival: Callable[[Any], None] | None = None
    ) -> None:
        self._model: Callable[[], Any] = weakref.ref(model) if weak else lambda: model
        self._on_arrival = on_arrival
        self.owners: dict[str, Owner] = owners(model)
        self.steps = 1
        self._order: dict[str, None] = {}
        self._hooked: dict[int, weakref.ref[Any]] = {}
        self._earlier: set[str] = set()
        self._handles: list[Any] = []
        self._depth = 0

    @property
    def model(self) -> Any:
        """The model as it was given."""
        return self._model()

    @property
    def trainable(self) -> list[str]:
        """Names of the parameters that ask for a gradient."""
        return list(self._trainable())

    def _trainable(self) -> dict[str, Any]:
        model = self.model
        if model is None:
            return {}
        return {name: p for name, p in named_parameters(model).items() if p.requires_grad}

    @property
    def arrived(self) -> set[str]:
        """Names whose gradient arrived in this step."""
        return set(self._order)

    @property
    def arrived_ever(self) -> set[str]:
        """Names whose gradient arrived in any step."""
        return self._earlier | set(self._order)

    @property
    def missing(self) -> list[str]:
        """Trainable names, in the model's order, without a gradient in this step."""
        arrived = self.arrived
        return [name for name in self.trainable if name not in arrived]

    @property
    def missing_ever(self) -> list[str]:
        """Trainable names, in the model's order, without a gradient in any step."""
        arrived = self.arrived_ever
        return [name for name in self.trainable if name not in arrived]

    @property
    def order(self) -> list[str]:
        """Names in the order in which their gradients first arrived in this step."""
        return list(self._order)

    def step(self) -> None:
        """Begin a new step: what arrived so far is kept in ``arrived_ever`` only."""
        self._earlier |= set(self._order)
        self._order = {}
        self.steps += 1

    def assert_all_arrived(self) -> None:
        """Raises AssertionError naming every trainable parameter without a gradient, and its module.

        Also where no parameter is trainable: nothing could be said of any.
        """
        if self.owners and not self.trainable:
            raise AssertionError(
                f"none of {len(self.owners)} parameters is trainable, so no gradient can arrive\n"
                "  likely: the whole model is frozen (requires_grad=False)"
            )
        missing = self.missing
        if missing:
            raise AssertionError(
                f"{len(missing)} of {len(self.trainable)} trainable parameters got no gradient: "
                f"{describe_missing(missing, self.owners)}\n"
                f"  likely: {likely_cause(missing, self.trainable)}"
            )

    def __enter__(self) -> GradTracer:
        self._depth += 1
        if self._depth == 1:
            self.refresh(self._trainable())
        return self

    def refresh(self, parameters: dict[str, Any]) -> dict[str, Any]:
        """Hooks those of the parameters that were replaced or thawed since, and returns them."""
        new = {name: p for name, p in parameters.items() if p.requires_grad and not self._is_hooked(p)}
        for name, parameter in new.items():
            self._handles.append(parameter.register_post_accumulate_grad_hook(self._hook(name)))
            self._hooked[id(parameter)] = weakref.ref(parameter)
        return new

    def _is_hooked(self, parameter: Any) -> bool:
        reference = self._hooked.get(id(parameter))  # an id may be used again, for another parameter
        return reference is not None and reference() is parameter

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._depth -= 1
        if self._depth == 0:
            for handle in self._handles:
                handle.remove()
            self._handles.clear()
            self._hooked.clear()

    def _hook(self, name: str) -> Any:
        def arrived(parameter: Any) -> None:
            self._order[name] = None

        if (on_arrival := self._on_arrival) is None:
            return arrived

        def arrived_and_told(parameter: Any) -> None:
            self._order[name] = None
            on_arrival(parameter)

        return arrived_and_told


def describe_missing(names: list[str], owned_by: dict[str, Owner]) -> str:
    """The parameters with their modules, the first ten in full."""
    shown = [f"{name} ({owned_by[name]})" if name in owned_by else name for name in names[:_NAMED_IN_MESSAGE]]
    more = len(names) - len(shown)
    return ", ".join(shown) + (f" and {more} more" if more else "")


def likely_cause(missing: list[str], trainable: list[str]) -> str:
    if len(missing) == len(trainable):
        return "backward() never ran, or the loss is detached from the model (.detach(), .item(), no_grad)"
    return "forward never uses the module, its output is detached, or it runs under no_grad"
