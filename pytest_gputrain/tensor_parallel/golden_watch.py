"""A forward and backward with every leaf module's inputs and outputs kept, and their gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from pytest_gputrain.case import TrainingCase
from pytest_gputrain.tensor_parallel.golden_model import address_of
from pytest_gputrain.tensor_parallel.golden_outputs import ask
from pytest_gputrain.trace.names import canonical_name

MOST_CALLS = 32  # of one module that are watched: each keeps its activations


def call_name(module: str, call: int) -> str:
    return module if call <= 1 else f"{module} (call {call})"


def module_of(name: str) -> str:
    """The module, of the name of any call."""
    return name.partition(" (call ")[0]


def _in_backward() -> bool:
    """Where checkpointing runs a forward again."""
    return int(torch._C._current_graph_task_id()) != -1


class Watch:
    """Every leaf module's first input (entry) and output (value), and the gradients of both, by name.

    Of a module that is called more than once, each call has a name of its own. reads: the module whose output
    it was given, as that module gave it.
    """

    def __init__(self, model: nn.Module) -> None:
        self.order: list[str] = []
        self.inputs: dict[str, Any] = {}
        self.outputs: dict[str, Any] = {}
        self.values: dict[str, Any] = {}
        self.entries: dict[str, Any] = {}
        self.reads: dict[str, str] = {}
        self._makers: dict[int, str] = {}
        self._before: dict[str, Any] = {}  # autograd's nodes: what made an input, and an output
        self._after: dict[str, Any] = {}
        self._handles: list[Any] = []
        for name, module in model.named_modules():
            if name and not any(True for _ in module.children()):
                self._watch(canonical_name(name), module)

    def _watch(self, module_name: str, module: nn.Module) -> None:
        calls = 0

        def before(module: Any, args: tuple[Any, ...]) -> Any:
            nonlocal calls
            calls += not _in_backward()
            name = call_name(module_name, calls)
            if _in_backward() or calls > MOST_CALLS or not args or not _tracked(args[0]):
                return None
            # Outputs are kept, so that no other tensor comes to lie where one lay.
            if maker := self._makers.get(address_of(args[0])):
                self.reads[name] = maker
            self.entries[name] = args[0].detach()
            self._before[name] = args[0].grad_fn
            own = args[0].view_as(args[0])
            own.register_hook(_keep(self.inputs, name))
            return (own, *args[1:])

        def after(module: Any, args: Any, output: Any) -> None:
            if _in_backward() or calls > MOST_CALLS:
                return
            name = call_name(module_name, calls)
            self.order.append(name)
            if isinstance(output, torch.Tensor) and output.is_floating_point():
                self.values[name] = output.detach()
                self._makers[address_of(output)] = name
            if _tracked(output):
                self._after[name] = output.grad_fn
                output.register_hook(_keep(self.outputs, name))

        # Before a plan's own hooks: the input as it comes, the output as it goes.
        self._handles.append(module.register_forward_pre_hook(before, prepend=True))
        self._handles.append(module.register_forward_hook(after))

    def behind(self, name: str) -> set[str]:
        """The modules whose input depends on that module's output; empty where that cannot be said."""
        start = self._after.get(name)
        if start is None:
            return set()
        depends = {start: True, None: False}
        for node in self._before.values():
            _depends(node, depends)
        return {other for other, node in self._before.items() if depends[node]}

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()


def _depends(node: Any, known: dict[Any, bool]) -> None:
    """Adds to ``known`` whether autograd's node comes behind one that does, and all nodes on the way."""
    pending = [node]
    while pending:
        one = pending[-1]
        before = [other for other, _ in one.next_functions] if one not in known else []
        unknown = [other for other in before if other not in known]
        if unknown:
            pending += unknown
            continue
        pending.pop()
        if one not in known:
            known[one] = any(known[other] for other in before)


def _keep(into: dict[str, Any], name: str) -> Callable[[Any], None]:
    def hook(gradient: Any) -> None:
        into.setdefault(name, gradient.detach())

    return hook


def _tracked(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.requires_grad


def watched(case: TrainingCase, model: nn.Module, batch: Any, seed: int) -> Watch:
    watch = Watch(model)
    model.zero_grad(set_to_none=True)
    try:
        ask(case, model, batch, seed, gradients=True)
    finally:
        watch.remove()
        model.zero_grad(set_to_none=True)
    return watch
