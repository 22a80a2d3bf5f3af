"""Who a tensor belongs to: modules and optimizers tell, through torch's public global hooks.

A module is asked when it first runs forward, an optimizer around each of its steps; gradients are known from
the moment in which autograd leaves them at their parameter. No attribute of the user's objects is touched.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.nn.modules import module as module_hooks
from torch.optim import optimizer as optimizer_hooks
from torch.utils.weak import WeakIdKeyDictionary

from pytest_gputrain.memory import categories

Mark = Callable[[torch.Tensor, str], None]


class Owners:
    """Context manager: ``mark(tensor, category)`` is called with what modules and optimizers hold."""

    def __init__(self, mark: Mark) -> None:
        self._mark = mark
        # By identity: tensors and some modules define == for their own ends.
        self._modules: Any = WeakIdKeyDictionary()
        self._hooked: Any = WeakIdKeyDictionary()
        self._forward_depth = 0
        self._step_depth = 0
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> Owners:
        self._forward_depth = self._step_depth = 0
        for handle in (
            module_hooks.register_module_forward_pre_hook(self._before_forward),
            module_hooks.register_module_forward_hook(self._after_forward, always_call=True),
            optimizer_hooks.register_optimizer_step_pre_hook(self._before_step),
            optimizer_hooks.register_optimizer_step_post_hook(self._after_step),
        ):
            self._stack.callback(handle.remove)
        return self

    def __exit__(self, *exception: object) -> None:
        self._stack.close()
        self._modules.clear()
        self._hooked.clear()

    def adopt(self, root: Any) -> None:
        """Mark what a module or an optimizer holds now."""
        if isinstance(root, torch.nn.Module):
            self._adopt_module(root)
        else:
            self._adopt_optimizer(root)

    def category_of_result(self, args: Any) -> str:
        """What the results of an operation with these arguments are for, until an owner says otherwise."""
        if self._step_depth:
            return categories.OTHER
        if self._forward_depth or torch._C._current_graph_task_id() != -1 or _is_differentiated(args):
            return categories.ACTIVATIONS
        return categories.OTHER

    def _adopt_module(self, module: torch.nn.Module) -> None:
        for inner in module.modules():
            self._modules[inner] = True
        for parameter in module.parameters():
            self._adopt_parameter(parameter)
        for buffer in module.buffers():
            self._mark(buffer, categories.BUFFERS)

    def _adopt_parameter(self, parameter: torch.Tensor) -> None:
        self._mark(parameter, categories.PARAMETERS)
        if parameter.grad is not None:
            self._mark(parameter.grad, categories.GRADIENTS)
        if parameter.requires_grad and parameter.is_leaf and parameter not in self._hooked:
            self._hooked[parameter] = True
            handle = parameter.register_post_accumulate_grad_hook(self._gradient_arrived)
            self._stack.callback(handle.remove)

    def _adopt_optimizer(self, optimizer: Any) -> None:
        for parameter in [parameter for group in optimizer.param_groups for parameter in group["params"]]:
            self._adopt_parameter(parameter)
        for tensor in _tensors_in(optimizer.state):
            self._mark(tensor, categories.OPTIMIZER_STATE)

    def _gradient_arrived(self, parameter: torch.Tensor) -> None:
        if parameter.grad is not None:
            self._mark(parameter.grad, categories.GRADIENTS)

    def _before_forward(self, module: torch.nn.Module, args: Any) -> None:
        if not self._forward_depth and module not in self._modules:
            self._adopt_module(module)
        self._forward_depth += 1

    def _after_forward(self, module: torch.nn.Module, args: Any, output: Any) -> None:
        self._forward_depth -= 1

    def _before_step(self, optimizer: Any, args: Any, kwargs: Any) -> None:
        self._adopt_optimizer(optimizer)
        self._step_depth += 1

    def _after_step(self, optimizer: Any, args: Any, kwargs: Any) -> None:
        self._step_depth -= 1
        self._adopt_optimizer(optimizer)


def _is_differentiated(args: Any) -> bool:
    if not torch.is_grad_enabled():
        return False
    for value in args:
        if isinstance(value, torch.Tensor):
            if value.requires_grad:
                return True
        elif isinstance(value, list | tuple) and _is_differentiated(value):
            return True
    return False


def _tensors_in(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, dict):
        for inner in value.values():
            yield from _tensors_in(inner)
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from _tensors_in(inner)
