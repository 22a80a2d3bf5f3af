"""Gives memory back after an out-of-memory: what the exception, the gradients and the caches still hold."""

from __future__ import annotations

import ctypes
import functools
import gc
import traceback
from collections.abc import Callable, Iterator
from typing import Any

import torch


def release(error: BaseException | None = None, model: Any = None, optimizer: Any = None) -> None:
    """Free what nobody needs any more, on the host (which gets it back, too) and on GPUs in use.

    Of ``error`` and of everything it wraps, the frames that have ended lose their local variables (a running
    frame keeps its own: those are the caller's); of ``model`` and ``optimizer`` the gradients are dropped,
    while optimizer state stays. Makes no CUDA context.
    """
    clear_frames(error)
    drop_unfinished_backward()
    for holder in (model, optimizer):
        if holder is not None:
            holder.zero_grad(set_to_none=True)
    gc.collect()
    if trim := _malloc_trim():
        trim(0)
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()


def drop_unfinished_backward() -> None:
    """A backward that raised leaves what it had not come to, graph and all, in the queue of its thread, until
    another one runs there: one that is as small as can be.
    """
    if torch._C._current_graph_task_id() != -1:  # called from within a backward
        return
    with torch.inference_mode(False), torch.enable_grad():
        one = torch.zeros((), device="cpu", requires_grad=True)
        torch.autograd.grad(one * 1, one)


@functools.cache
def _malloc_trim() -> Callable[[int], int] | None:
    """glibc's: without it a process keeps freed memory that lies below anything still in use. Else None."""
    try:
        trim: Callable[[int], int] = ctypes.CDLL(None).malloc_trim
    except (AttributeError, OSError, TypeError):  # another C library; Windows
        return None
    return trim


def clear_frames(error: BaseException | None) -> None:
    """Empty the local variables of every frame that the exception keeps alive and that has ended."""
    for link in everything_kept(error):
        traceback.clear_frames(link.__traceback__)


def everything_kept(error: BaseException | None) -> Iterator[BaseException]:
    """The exception and all that it keeps alive, suppressed contexts and the members of groups included."""
    todo, seen = [error], set[int]()
    while todo:
        link = todo.pop()
        if not isinstance(link, BaseException) or id(link) in seen:
            continue
        seen.add(id(link))
        yield link
        todo += [link.__cause__, link.__context__, getattr(link, "inner_exception", None)]
        if isinstance(members := getattr(link, "exceptions", None), tuple):
            todo += members
