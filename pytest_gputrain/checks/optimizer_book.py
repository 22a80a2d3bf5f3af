"""What ``optimizer_covers`` sees of each parameter while the case's own steps run."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass
class Book:
    """What was seen of each parameter, by name, over all steps."""

    parameters: dict[str, Any]
    held: set[str] = field(default_factory=set)
    twice: dict[str, list[str]] = field(default_factory=dict)
    broken: set[str] = field(default_factory=set)
    moved: set[str] = field(default_factory=set)
    moved_in_update: set[str] = field(default_factory=set)
    pushed: set[str] = field(default_factory=set)
    cleared: set[str] = field(default_factory=set)
    beyond_rounding: set[str] = field(default_factory=set)
    rates: dict[str, float] = field(default_factory=dict)
    outside: list[Any] = field(default_factory=list)
    updates: int = 0
    torch_updates: int = 0

    def __post_init__(self) -> None:
        self.names = {id(parameter): name for name, parameter in self.parameters.items()}
        self._before: dict[str, Any] = {}
        self._updating = False
        self._holders: dict[str, dict[int, str]] = {}

    def begin_step(self) -> None:
        """Two optimizers may take turns from step to step; in one step they may not both hold a parameter."""
        self._holders.clear()

    def hold(self, optimizer: Any) -> None:
        """What one optimizer has in its groups; with a name for the message if it has one twice."""
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                name = self.names.get(id(parameter))
                if name is None:
                    self.outside.append(parameter)
                    continue
                self.held.add(name)
                rate = abs(float(group.get("lr", 1.0)))
                self.rates[name] = max(rate, self.rates.get(name, 0.0))

    def before_update(self, optimizer: Any, held: list[Any] | None) -> None:
        self._before, self._updating = snapshot(self.parameters), True
        if held is None:
            names = list(self.parameters)
        else:
            self.torch_updates += 1
            self.hold(optimizer)
            names = [self.names[id(parameter)] for parameter in held if id(parameter) in self.names]
            self._count_holders(optimizer, names)
        for name in names:
            self._look(name)

    def after_update(self, optimizer: Any, held: list[Any] | None) -> None:
        self.updates += 1
        self._updating = False
        self.moved_in_update |= changed(self._before, self.parameters)

    def after_backward(self, original: Any, *args: Any, **kwargs: Any) -> Any:
        """Around a backward pass: which gradients there are before anybody can clear them."""
        from pytest_gputrain.trace.digest import whole

        outcome = original(*args, **kwargs)
        for name, parameter in self.parameters.items():
            if parameter.grad is not None and bool((whole(parameter.grad) != 0).any()):
                self.cleared.add(name)
                if self._updating:  # a closure: the optimizer calls back for its gradients
                    self.pushed.add(name)
        return outcome

    def _count_holders(self, optimizer: Any, names: list[str]) -> None:
        for name in dict.fromkeys(names):
            holders = self._holders.setdefault(name, {})
            holders[id(optimizer)] = type(optimizer).__name__
            if names.count(name) > 1:
                self.twice[name] = [type(optimizer).__name__] * names.count(name)
            elif len(holders) > 1:
                self.twice[name] = list(holders.values())

    def _look(self, name: str) -> None:
        """Whether this parameter has a gradient, and one that its precision can turn into a movement."""
        import torch

        from pytest_gputrain.trace.digest import is_finite, whole

        parameter = self.parameters[name]
        gradient = parameter.grad
        if gradient is None:
            return
        if not is_finite(gradient):
            self.broken.add(name)
        gradient = whole(gradient).abs().double()
        if not bool((gradient != 0).any()):
            return
        self.pushed.add(name)
        step = self.rates.get(name, 1.0) * gradient.clamp(max=1.0)
        smallest = torch.finfo(parameter.dtype).eps * parameter.detach().abs().double()
        if bool((step > smallest).any()):
            self.beyond_rounding.add(name)


def snapshot(parameters: dict[str, Any]) -> dict[str, Any]:
    return {name: parameter.detach().clone() for name, parameter in parameters.items()}


def changed(before: dict[str, Any], parameters: dict[str, Any]) -> set[str]:
    import torch

    return {name for name, old in before.items() if not torch.equal(old, parameters[name].detach())}
