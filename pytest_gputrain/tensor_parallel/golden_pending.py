"""Collectives whose result is read before anybody has waited for it (``async_op=True``).

Values say so by chance only: on gloo the sum of a few numbers is often there in time, and on NCCL the reading
kernel may come behind it. What is seen here is the order: started, read, waited for.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import torch

from pytest_gputrain.case import pytree
from pytest_gputrain.launch.stacks import Frame, user_frame

Span = tuple[int, int]
_PACKAGE = str(Path(__file__).parent.parent)
_TORCH = str(Path(torch.__file__).parent)
_C10D = str(Path(_TORCH, "distributed", "distributed_c10d.py"))
_BETWEEN = (_PACKAGE, _TORCH, "<string>")  # the last are our records of calls
# Of a work: what waits for it, or hands the waiting to somebody else, whom nothing is known of.
_WAITS = ("wait", "synchronize", "get_future", "block_current_stream", "result")


@dataclass(frozen=True)
class Started:
    """One collective under way. spans: the memory that it writes to; layer: the module that started it."""

    work: Any
    spans: tuple[Span, ...]
    kind: str
    layer: str
    where: str


class Pending:
    """In it, every wait for a collective is noted. early: what was read before, as lines, each once.

    Empty with a torch that does not tell which work an operator gave (before 2.8).
    """

    def __init__(self) -> None:
        self.early: list[str] = []
        self._open: list[Started] = []
        self._kept: dict[str, Callable[..., Any]] = {}

    def __enter__(self) -> Pending:
        work = _work_class()
        if hasattr(work, "unbox"):
            for name in (*_WAITS, "is_completed"):
                if hasattr(work, name):
                    self._kept[name] = getattr(work, name)
                    setattr(work, name, self._waiting(self._kept[name]))
        return self

    def __exit__(self, *error: object) -> None:
        for name, method in self._kept.items():
            setattr(_work_class(), name, method)
        self._kept = {}

    def _waiting(self, method: Callable[..., Any]) -> Callable[..., Any]:
        def waiting(work: Any, *args: Any, **kwargs: Any) -> Any:
            answer = method(work, *args, **kwargs)
            if answer is not False:  # of is_completed: not yet
                self._open = [one for one in self._open if one.work is not work]
            return answer

        return waiting

    def started(self, kind: str, layer: str, args: tuple[Any, ...], result: Any) -> None:
        """An operator of c10d has run: what it writes is not there yet, unless its caller waits at once.

        Who calls it in C++, as DDP's reducer, waits for it there, where nobody sees it.
        """
        if not self._kept or any(arg is False for arg in args) or not _is_called_in_python():
            return
        boxed = result[-1] if isinstance(result, tuple) else result
        if not isinstance(boxed, torch.ScriptObject) or not args:
            return
        spans = tuple(_span(tensor) for tensor in pytree.tensors(args[0]) if tensor.numel())
        if spans:
            self._open.append(Started(_work_class().unbox(boxed), spans, kind, layer, _where()))

    def reads(self, operator: Any, args: Any, kwargs: Any) -> None:
        """Any other operator is about to run; one that makes a view of memory reads none of it."""
        if not self._open or _is_view(operator):
            return
        for tensor in pytree.tensors([args, kwargs]):
            for one in self._of(tensor):
                self._tell(one, f"is used {_where()} before")

    def left_in(self, gradients: Iterator[Any]) -> None:
        """What an optimizer would read next, and nobody has waited for."""
        for gradient in gradients:
            for one in self._of(gradient):
                self._tell(one, "is a parameter's gradient, and nobody has waited for it, where")

    def _of(self, tensor: torch.Tensor) -> list[Started]:
        if not self._open or not tensor.numel():
            return []
        start, end = _span(tensor)
        return [one for one in self._open if any(a < end and start < b for a, b in one.spans)]

    def _tell(self, one: Started, what: str) -> None:
        line = (
            f"{one.layer or 'the model'}: the {one.kind} started {one.where} {what} it is waited for; "
            "call wait() on what async_op=True returns"
        )
        self._open = [other for other in self._open if other is not one]
        if line not in self.early:
            self.early.append(line)


def _work_class() -> Any:
    from torch._C._distributed_c10d import Work

    return Work


def _span(tensor: Any) -> Span:
    """First and last address of what a tensor covers; of a DTensor's own part."""
    inner = getattr(tensor, "_local_tensor", tensor)
    try:
        start = inner.data_ptr()
    except RuntimeError:  # a tensor without memory
        return (0, 0)
    steps = zip(inner.shape, inner.stride(), strict=True)
    extent = 1 + sum((size - 1) * abs(stride) for size, stride in steps)
    return start, start + extent * inner.element_size()


def _is_view(operator: Any) -> bool:
    aliases = [result.alias_info for result in operator._schema.returns]
    return any(alias is not None and not alias.is_write for alias in aliases)


def _is_called_in_python() -> bool:
    """Whether the operator that runs is that of one of ``torch.distributed``'s functions."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_code.co_filename.startswith(_BETWEEN):
        if frame.f_code.co_filename == _C10D:
            return True
        frame = frame.f_back
    return False


def _where() -> str:
    """The innermost line that is neither torch's nor this package's."""
    frames: list[Frame] = []
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if not frame.f_code.co_filename.startswith(_PACKAGE):
            frames.append(Frame(frame.f_code.co_filename, frame.f_lineno, frame.f_code.co_name))
        frame = frame.f_back
    found = user_frame(frames)
    return f"at {found}" if found else "by autograd itself"
