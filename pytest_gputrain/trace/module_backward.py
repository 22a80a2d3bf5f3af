"""Which modules the gradient has come through, and whether it is zero or not finite there.

A hook on the output tensors and not on the modules: a full backward hook turns a module's output into a
view, which breaks scripts that change it in place. Looks at values, so on a GPU it waits for them. Does not
see inside compiled graphs.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from pytest_gputrain.trace.lines import module_line
from pytest_gputrain.trace.sink import Progress, Sink

MOST_PARTS = 3
"""Parts of the names that get lines: ``blocks.4.attn`` does, what is inside it does not."""


class ModuleTracer:
    """Writes a line for each module whose output got a gradient, in the order of backward."""

    def __init__(self, names: Mapping[Any, str], sink: Sink, progress: Progress) -> None:
        self._names, self._sink, self._progress = names, sink, progress
        self._waiting: dict[str, None] = {}

    @contextlib.contextmanager
    def hooked(self) -> Iterator[None]:
        """Sees every module's output meanwhile."""
        from torch.nn.modules.module import register_module_forward_hook

        handle = register_module_forward_hook(self._forward)
        try:
            yield
        finally:
            handle.remove()

    def end_step(self) -> None:
        """The step is over: modules that ran in training and got no gradient."""
        missing, self._waiting = self._waiting, {}
        self._sink.write("module_bwd", [module_line(self._progress.step, name, "none") for name in missing])

    def _forward(self, module: Any, args: Any, output: Any) -> None:
        import torch

        if torch.compiler.is_compiling() or not module.training:
            return
        name = self._names.get(module)
        if name is None or name.count(".") >= MOST_PARTS:
            return
        self._waiting[name] = None
        tensor = _first_tensor(output)
        if tensor is not None and tensor.requires_grad:
            tensor.register_hook(self._hook(name))

    def _hook(self, name: str) -> Callable[[Any], None]:
        def computed(gradient: Any) -> None:
            self._progress.beat()
            self._waiting.pop(name, None)
            line = module_line(self._progress.step + 1, name, _state(gradient))
            self._sink.write("module_bwd", [line])

        return computed


@contextlib.contextmanager
def roots_met(meet: Callable[[Any], bool]) -> Iterator[None]:
    """``meet`` is called with each module that is called, until it returns True."""
    import torch
    from torch.nn.modules.module import register_module_forward_pre_hook

    def before(module: Any, args: Any) -> None:
        if not torch.compiler.is_compiling() and meet(module):
            handle.remove()

    handle = register_module_forward_pre_hook(before)
    try:
        yield
    finally:
        handle.remove()


def _first_tensor(output: Any) -> Any:
    """The first tensor in whatever a module returns."""
    import torch

    if isinstance(output, torch.Tensor):
        return output
    items = (
        output.values() if isinstance(output, dict) else output if isinstance(output, list | tuple) else ()
    )
    return next((found for item in items if (found := _first_tensor(item)) is not None), None)


def _state(gradient: Any) -> str:
    import torch

    gradient = gradient.to_local() if hasattr(gradient, "to_local") else gradient
    if bool(torch.isnan(gradient).any()):
        return "nan"
    if bool(torch.isinf(gradient).any()):
        return "inf"
    return "ok" if bool(gradient.any()) else "zero"
