"""Everything of torch's private interface that prediction needs, and nowhere else in this package.

Fake tensors have a shape, a type and a storage that knows its size, and no data: a training step on them is
the real step's operations, autograd included, in a second and in no memory. Their names carry an underscore
in torch and may move; where one is missing, `PredictionUnavailable` says which torch has them.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

try:
    from torch._subclasses.fake_tensor import (
        DataDependentOutputException,
        DynamicOutputShapeException,
        FakeTensor,
        FakeTensorMode,
        unset_fake_temporarily,
    )
except ImportError as error:  # pragma: no cover - torch as it is today has them
    MISSING: ImportError | None = error
else:
    MISSING = None

__all__ = [
    "DispatchMode",
    "PredictionUnavailable",
    "fake_mode",
    "is_fake",
    "outside",
    "overridden",
    "shape_unknown",
]

DispatchMode: Any = TorchDispatchMode


class PredictionUnavailable(RuntimeError):
    """This torch lacks an interface that prediction stands on; a measured search works all the same."""


def fake_mode() -> Any:
    """A fresh mode whose tensors are fake. Raises PredictionUnavailable where this torch has none.

    Real tensors that a model brings along (weights from a file, tables from numpy) are taken as fake ones.
    """
    if MISSING is not None:
        raise PredictionUnavailable(
            f"torch {torch.__version__} lacks what prediction needs ({MISSING}); written for torch 2.8 to "
            "2.14, and a measured search (find-batch without --capacity) needs none of it"
        )
    return FakeTensorMode(allow_non_fake_inputs=True)


def is_fake(tensor: Any) -> bool:
    return isinstance(tensor, FakeTensor)


def as_fake(mode: Any, tensor: Any) -> Any:
    """The fake twin of a real tensor: the same shape, strides, type and autograd flags."""
    return mode.from_tensor(tensor, static_shapes=True)


@contextlib.contextmanager
def conversions(mode: Any) -> Iterator[None]:
    """``Module.to`` works: it exchanges parameters, which torch refuses while the mode refers to them."""
    swap: Any = torch.utils.swap_tensors

    def swap_unremembered(first: Any, second: Any) -> None:
        memo = mode.fake_tensor_converter.meta_converter.tensor_memo
        for key in [key for key, known in memo.items() if known is first or known is second]:
            del memo[key]
        swap(first, second)

    torch.utils.swap_tensors = swap_unremembered
    try:
        yield
    finally:
        torch.utils.swap_tensors = swap


def outside() -> Any:
    """Context manager: operations inside are real again."""
    return unset_fake_temporarily()


def shape_unknown() -> tuple[type[Exception], ...]:
    """What a fake tensor raises where the answer depends on values that it does not have."""
    return (DataDependentOutputException, DynamicOutputShapeException)


@contextlib.contextmanager
def overridden(kernels: dict[tuple[str, str], Callable[..., Any]]) -> Iterator[None]:
    """``{(operator of aten, dispatch key): function}`` take the place of torch's kernels, until the end.

    An operator that this torch does not have is left out: an older one has fewer.
    """
    library = torch.library.Library("aten", "IMPL")
    try:
        for (operator, key), function in kernels.items():
            if _has(f"aten::{operator}"):
                library.impl(operator, function, key)
        yield
    finally:
        library._destroy()


def has_kernel(operator: str, key: str) -> bool:
    """Whether torch itself has a kernel of its own for this operator of aten and dispatch key."""
    name = f"aten::{operator}"
    return _has(name) and bool(torch._C._dispatch_has_kernel_for_dispatch_key(name, key))


def _has(qualified: str) -> bool:
    name, _, overload = qualified.partition(".")
    try:
        torch._C._dispatch_find_schema_or_throw(name, overload)
    except RuntimeError:
        return False
    return True


def without(key: str) -> Any:
    """Context manager: a dispatch key is passed over, so that a kernel can call what it replaced."""
    return torch._C._ExcludeDispatchKeyGuard(torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, key)))


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """torch logs what a fake operation raises, in many lines, before raising it: the exception is enough."""
    logger = logging.getLogger("torch._subclasses.fake_tensor")
    before, logger.disabled = logger.disabled, True
    try:
        yield
    finally:
        logger.disabled = before
