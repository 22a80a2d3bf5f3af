"""Which parameters got a gradient, and in which order, without changing any of them.

"Arrived" means accumulated into ``parameter.grad`` by autograd (``register_post_accumulate_grad_hook``).
Does not see gradients that are assigned by hand to ``parameter.grad``.
"""

from __future__ import annotations

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
    """

    def __init__(self, model: Any) -> None:
        self.model = model
        self.owners: dict[str, Owner] = owners(model)
        self.steps = 1
        self._order: list[str] = []
        self._earlier: set[str] = set()
        self._handles: list[Any] = []
        self._depth = 0

    @property
    def trainable(self) -> list[str]:
        """Names of the parameters that ask for a gradient."""
        return [name for name, parameter in named_parameters(self.model).items() if parameter.requires_grad]

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
        return [name for name in self.trainable if name not in self.arrived]

    @property
    def missing_ever(self) -> list[str]:
        """Trainable names, in the model's order, without a gradient in any step."""
        return [name for name in self.trainable if name not in self.arrived_ever]

    @property
    def order(self) -> list[str]:
        """Names in the order in which their gradients first arrived in this step."""
        return list(dict.fromkeys(self._order))

    def step(self) -> None:
        """Begin a new step: what arrived so far is kept in ``arrived_ever`` only."""
        self._earlier |= set(self._order)
        self._order = []
        self.steps += 1

    def assert_all_arrived(self) -> None:
        """Raises AssertionError naming every trainable parameter without a gradient, and its module."""
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
            for name, parameter in named_parameters(self.model).items():
                if parameter.requires_grad:
                    self._handles.append(parameter.register_post_accumulate_grad_hook(self._hook(name)))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._depth -= 1
        if self._depth == 0:
            for handle in self._handles:
                handle.remove()
            self._handles.clear()

    def _hook(self, name: str) -> Any:
        def arrived(parameter: Any) -> None:
            self._order.append(name)

        return arrived


def describe_missing(names: list[str], owned_by: dict[str, Owner]) -> str:
    """The parameters with their modules, the first ten in full."""
    shown = [f"{name} ({owned_by[name]})" if name in owned_by else name for name in names[:_NAMED_IN_MESSAGE]]
    more = len(names) - len(shown)
    return ", ".join(shown) + (f" and {more} more" if more else "")


def likely_cause(missing: list[str], trainable: list[str]) -> str:
    if len(missing) == len(trainable):
        return "backward() never ran, or the loss is detached from the model (.detach(), .item(), no_grad)"
    return "forward never uses the module, its output is detached, or it runs under no_grad"
