"""Whether an exception means that memory ran out: every form of it, and nothing else.

A wrong yes is as bad as a wrong no: a bug that is counted as out-of-memory makes a search come out green at a
smaller batch size. So texts count only in exceptions of the kinds that torch and its libraries raise, and
only those that they print. ``CUDNN_STATUS_NOT_SUPPORTED``, ``CUBLAS_STATUS_NOT_INITIALIZED`` and Triton's
``OutOfResources`` (a kernel that wants more shared memory than a GPU has) are none, or not certainly.
"""

from __future__ import annotations

import errno
import re
from collections.abc import Iterator
from typing import Any

import torch

_TEXTS = re.compile(
    r"\b(?:CUDA|HIP|XPU|NPU|HPU)(?: driver)?(?: error:)? out of memory"
    r"|MPS backend out of memory"
    r"|Triton Error \[\w+\]: out of memory"
    r"|Cuda failure (?:\d+ )?'out of memory'"  # NCCL
    r"|\bCUDA_ERROR_OUT_OF_MEMORY\b|\bcudaErrorMemoryAllocation\b|\bhipErrorOutOfMemory\b"
    r"|\b(?:CUBLAS|HIPBLAS|CUSOLVER|CUSPARSE|CUDNN|MIOPEN)_STATUS_ALLOC_FAILED\b|\bmiopenStatusAllocFailed\b"
    r"|\bCUDNN_STATUS_INTERNAL_ERROR_(?:HOST|DEVICE)_ALLOCATION_FAILED\b"
    r"|\bCUFFT_ALLOC_FAILED\b|\bCURAND_STATUS_ALLOCATION_FAILED\b"
    r"|DefaultCPUAllocator: (?:can't allocate memory|not enough memory)"
    r"|unable to mmap \d+ bytes .*Cannot allocate memory"
    r"|^std::bad_alloc$"
)
# The line of a printed traceback that names the exception: of another process there is only the text.
_NAMED = re.compile(r"^\s*(?:[A-Za-z_]\w*\.)*(\w*(?:Error|Exception|OutOfMemory))(?:: |$)", re.MULTILINE)
_OUT_OF_MEMORY = ("OutOfMemoryError", "OutOfMemory", "MemoryError")
_WITH_TEXT = ("RuntimeError", "AcceleratorError", "DistBackendError")
# Kinds of RuntimeError that no allocator raises.
_NEVER = (NotImplementedError, RecursionError)
# Raised by a bug. With an out-of-memory as mere context, it is a bug in the code that handled that.
_BUGS = (
    ArithmeticError, AssertionError, AttributeError, ImportError, LookupError, NameError, SyntaxError,
    TypeError, ValueError,
)  # fmt: skip


def is_oom(error: BaseException) -> bool:
    """Whether memory ran out: in this exception, in what it was raised from, or in all members of a group."""
    return any(_is_oom_itself(link) for link in chain(error))


def chain(error: BaseException) -> Iterator[BaseException]:
    """The exception and what it wraps: causes, contexts, and torch.compile's ``inner_exception``."""
    seen: set[int] = set()
    todo: list[BaseException | None] = [error]
    while todo:
        link = todo.pop(0)
        if link is None or id(link) in seen:
            continue
        seen.add(id(link))
        yield link
        inner = getattr(link, "inner_exception", None)
        todo.append(inner if isinstance(inner, BaseException) else None)
        todo.append(link.__cause__)
        if not link.__suppress_context__ and not isinstance(link, _BUGS):
            todo.append(link.__context__)


def _is_oom_itself(error: BaseException) -> bool:
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    if isinstance(members := getattr(error, "exceptions", None), tuple) and members:
        return all(isinstance(member, BaseException) and is_oom(member) for member in members)
    if type(error).__name__ == "ProcessRaisedException":  # of torch.multiprocessing.spawn
        return _printed(str(error))
    if type(error).__name__ == "ChildFailedError":  # of torchrun's agent
        first: Any = getattr(error, "get_first_failure", None)
        return first is not None and _printed(str(first()[1].message))
    return isinstance(error, RuntimeError) and not isinstance(error, _NEVER) and _told(str(error))


def _told(text: str) -> bool:
    return _TEXTS.search(text) is not None


def _printed(text: str) -> bool:
    """Whether a printed traceback ends in an out-of-memory."""
    *_, last = [None, *_NAMED.finditer(text)]
    if last is None:
        return False
    return last[1] in _OUT_OF_MEMORY or (last[1] in _WITH_TEXT and _told(text[last.start() :]))
