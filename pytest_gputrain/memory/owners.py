"""Who a tensor belongs to: modules and optimizers tell, parameters by their type.

A parameter is known when an operation first uses it, its gradient from the moment in which autograd leaves it
there, optimizer state around each step, through torch's public hooks. Global hooks of modules are avoided:
torch.compile warns about them.
"""

from __future__ import annotations

import contextlib
import gc
import threading
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.optim import optimizer as optimizer_hooks

from pytest_gputrain.memory import categories

Mark = Callable[[torch.Tensor, str], None]


class Owners:
    """Context manager: ``mark(tensor, category)`` is called with what modules and optimizers hold.

    ``is_known(tensor)``: whether it is in the books, which modules that nobody uses are not to fill.
    """

    def __init__(self, mark: Mark, is_known: Callable[[torch.Tensor], bool] = lambda tensor: False) -> None:
        self.stepping = False
        self._mark = mark
        self._is_known = is_known
        self._hooked: dict[int, weakref.ref[torch.Tensor]] = {}
        self._modules: list[weakref.ref[torch.nn.Module]] = []
        self._optimizers: dict[int, weakref.ref[Any]] = {}
        self._stack = contextlib.ExitStack()
        self._thread = threading.get_ident()

    def __enter__(self) -> Owners:
        before = optimizer_hooks.register_optimizer_step_pre_hook(self._before_step)
        self._stack.callback(before.remove)
        after = optimizer_hooks.register_optimizer_step_post_hook(self._after_step)
        self._stack.callback(after.remove)
        return self

    def __exit__(self, *exception: object) -> None:
        self._stack.close()
        self._hooked.clear()

    def adopt(self, root: Any) -> None:
        """Mark what a module or an optimizer holds. Raises ``ValueError`` for anything else."""
        if isinstance(root, torch.nn.Module):
            self._modules.append(weakref.ref(root))
            self._adopt_module(root)
        elif hasattr(root, "param_groups") and hasattr(root, "state"):
            self._adopt_optimizer(root)
        else:
            raise ValueError(f"roots are modules and optimizers, not {type(root).__name__}")

    def adopt_parameter(self, parameter: torch.Tensor) -> None:
        """Mark a leaf and its gradient, also those to come."""
        if isinstance(parameter, torch.nn.Parameter):
            self._mark(parameter, categories.PARAMETERS)
        if parameter.is_leaf and parameter.grad is not None:  # torch warns of .grad elsewhere
            self._mark(parameter.grad, categories.GRADIENTS)
        known = self._hooked.get(id(parameter))  # an id may be used again
        if parameter.requires_grad and parameter.is_leaf and (known is None or known() is not parameter):
            self._hooked[id(parameter)] = weakref.ref(parameter)
            handle = parameter.register_post_accumulate_grad_hook(self._gradient_arrived)
            self._stack.callback(handle.remove)

    def refresh(self) -> None:
        """Mark what has changed since: state of a step that did not end, buffers of modules not given."""
        for optimizer in [reference() for reference in self._optimizers.values()]:
            if optimizer is not None:
                self._adopt_optimizer(optimizer)
        given = [module for reference in self._modules if (module := reference()) is not None]
        for module in given:
            self._adopt_module(module)
        for module in [] if given else _live_modules():
            for buffer in module.buffers(recurse=False):
                if self._is_known(buffer):
                    self._mark(buffer, categories.BUFFERS)

    def drop_gradients(self, of_here: Callable[[torch.Tensor], bool]) -> None:
        """Drop the gradients of which ``of_here`` says that they were made under the guard."""
        for reference in self._hooked.values():
            parameter = reference()
            if parameter is not None and parameter.grad is not None and of_here(parameter.grad):
                parameter.grad = None

    def _adopt_module(self, module: torch.nn.Module) -> None:
        for parameter in module.parameters():
            self.adopt_parameter(parameter)
        for buffer in module.buffers():
            self._mark(buffer, categories.BUFFERS)

    def _adopt_optimizer(self, optimizer: Any) -> None:
        self._optimizers.setdefault(id(optimizer), weakref.ref(optimizer))
        for parameter in [parameter for group in optimizer.param_groups for parameter in group["params"]]:
            self._mark(parameter, categories.PARAMETERS)
            self.adopt_parameter(parameter)
        for tensor in _tensors_in(optimizer.state):
            self._mark(tensor, categories.OPTIMIZER_STATE)

    def _gradient_arrived(self, parameter: torch.Tensor) -> None:
        if parameter.grad is not None:
            self._mark(parameter.grad, categories.GRADIENTS)

    def _before_step(self, optimizer: Any, args: Any, kwargs: Any) -> None:
        if threading.get_ident() == self._thread:  # the hooks are the whole process's
            self._adopt_optimizer(optimizer)
            self.stepping = True

    def _after_step(self, optimizer: Any, args: Any, kwargs: Any) -> None:
        if threading.get_ident() == self._thread:
            self.stepping = False
            self._adopt_optimizer(optimizer)


def _live_modules() -> list[torch.nn.Module]:
    """Every module in the process. By type: ``isinstance`` would run the ``__class__`` of lazy objects."""
    return [value for value in gc.get_objects() if issubclass(type(value), torch.nn.Module)]


def _tensors_in(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, dict):
        for inner in value.values():
            yield from _tensors_in(inner)
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from _tensors_in(inner)
