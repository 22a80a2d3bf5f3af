"""What steps may add to a model and its optimizers again and again: hooks, groups of parameters.

A hook a step is little memory and soon much time, as each of them runs in every step after it.
"""

from __future__ import annotations

from typing import Any

from pytest_gputrain.trace.optimizers import optimizers_in

_OF_MODULES = (
    "_forward_hooks",
    "_forward_pre_hooks",
    "_backward_hooks",
    "_backward_pre_hooks",
    "_state_dict_hooks",
    "_state_dict_pre_hooks",
    "_load_state_dict_post_hooks",
)
_OF_TENSORS = ("_backward_hooks", "_post_accumulate_grad_hooks")
_OF_OPTIMIZERS = ("_optimizer_step_pre_hooks", "_optimizer_step_post_hooks")


class Attached:
    """Counts them; modules and parameters are those that the model has at its begin."""

    def __init__(self, model: Any, optimizer: Any) -> None:
        self._modules = [vars(one) for one in model.modules()]
        self._parameters = [*model.parameters()]
        self._optimizers = optimizers_in(optimizer)

    def count(self) -> dict[str, int]:
        """Fields of a step's record."""
        hooks = sum(len(one.get(name) or ()) for one in self._modules for name in _OF_MODULES)
        hooks += _sum_of(self._parameters, _OF_TENSORS) + _sum_of(self._optimizers, _OF_OPTIMIZERS)
        groups = sum(len(one.param_groups) for one in self._optimizers)
        return {"hooks": hooks, "groups": groups}


def _sum_of(owners: list[Any], names: tuple[str, ...]) -> int:
    return sum(len(getattr(one, name, None) or ()) for one in owners for name in names)
