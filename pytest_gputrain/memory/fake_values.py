"""What is known of fake tensors' values: small ones that come of constants and of the batch.

A program branches on values: ``labels[labels != -100]``, ``lengths.max().item()``, ``mask.all()``. Where the
operands' values are known, the operation is done for real beside the fake one, and its answer is the true
one. Where they are not (a loss, a router's choice), the answer is chosen so that the step goes on and needs
most: a number is 1, a question is answered with no, a selection takes everything; each is remembered with
the line that asked.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._pytree import tree_flatten, tree_map_only

from pytest_gputrain.memory.fake_seam import as_fake, is_fake, outside, shape_unknown
from pytest_gputrain.memory.lines import creating_lines, location

# Integers and booleans decide branches, floats hardly ever; all of it is real memory and real time.
MOST_NUMBERS = 1 << 22
MOST_FLOATS = 1 << 14
_MASKS = (torch.bool, torch.uint8)
LARGEST_RESULT = "the largest result"
_KNOWN = "_gputrain_value"

# Gradients of which nothing is known have no overflow: a loss scaler then steps, as it does in most steps.
_LEAVES_VALUES = ("_amp_foreach_non_finite_check_and_unscale_",)
# Memory that nobody has written has no values yet.
_GROUPED = torch.ops.aten._grouped_mm.default
_UNWRITTEN = ("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided")


class Unanswerable(Exception):
    """An operation whose result depends on values that nobody knows, and has no upper bound."""


class Values:
    """Runs operations on fake tensors and follows the values that are known. ``guesses``: line -> answer."""

    def __init__(self, mode: Any) -> None:
        self.mode = mode
        self.guesses: dict[str, str] = {}
        self._stale: dict[int, Any] = {}  # storage -> weak reference: a later one may get the same address

    def know(self, fake: Any, real: Any) -> None:
        """From now on the values of ``fake`` are those of ``real``."""
        if _is_small(real):
            setattr(fake, _KNOWN, real)

    def of(self, tensor: Any) -> Any | None:
        """The values, or None where they are not known."""
        if not is_fake(tensor):
            return tensor if isinstance(tensor, torch.Tensor) and _is_small(tensor) else None
        real = getattr(tensor, _KNOWN, None)
        return None if real is None or _storage(real) in self._stale else real

    def run(self, func: Any, args: Any, kwargs: Any) -> Any:
        """One operation. Raises Unanswerable with the operation's name."""
        known = self._known(func, _tensors((args, kwargs)))
        try:
            out = grouped_product(func, *args) if func is _GROUPED else self._faked(func, args, kwargs)
        except shape_unknown():
            return self._answer(func, args, kwargs, known)
        if known:
            self._follow(func, args, kwargs, out)
        elif func._schema.is_mutable:
            self._forget(func, args, kwargs)
        return out

    def _faked(self, func: Any, args: Any, kwargs: Any) -> Any:
        """The operation, which must not write into a real tensor: fake modes let ``table += 1`` do that."""
        if func._schema.is_mutable and not all(map(is_fake, _tensors((args, kwargs)))):
            with outside():
                args, kwargs = tree_map_only(torch.Tensor, self._twin, (args, kwargs))
        return func(*args, **kwargs)

    def _twin(self, tensor: Any) -> Any:
        return tensor if is_fake(tensor) else as_fake(self.mode, tensor)

    def _known(self, func: Any, operands: list[Any]) -> bool:
        if torch.Tag.nondeterministic_seeded in func.tags or func.__name__.split(".")[0] in _UNWRITTEN:
            return False
        return all(self.of(one) is not None for one in operands)

    def _really(self, func: Any, args: Any, kwargs: Any) -> Any:
        def value(tensor: Any) -> Any:
            real = self.of(tensor)
            # What came along for real (a table, a running mean) is the program's own.
            return real.clone() if real is tensor and func._schema.is_mutable else real

        real_args, real_kwargs = tree_map_only(torch.Tensor, value, (args, kwargs))
        with outside(), torch.no_grad():
            return func(*real_args, **real_kwargs)

    def _follow(self, func: Any, args: Any, kwargs: Any, out: Any) -> None:
        """Do it for real where the result is small."""
        made, _ = tree_flatten(out)
        if not all(_is_small(one) for one in made if isinstance(one, torch.Tensor)):
            return
        real, _ = tree_flatten(self._really(func, args, kwargs))
        for fake, value in zip(made, real, strict=True):
            if is_fake(fake) and isinstance(value, torch.Tensor) and self.of(fake) is not value:
                setattr(fake, _KNOWN, value)

    def _forget(self, func: Any, args: Any, kwargs: Any) -> None:
        """What an operation with unknown operands writes into is unknown from now on, and all its views."""
        if func.__name__.split(".")[0] in _LEAVES_VALUES:
            return
        for spec, given in zip(func._schema.arguments, itertools.chain(args), strict=False):
            if spec.alias_info is not None and spec.alias_info.is_write:
                self._spoil(given)
        for spec in func._schema.arguments:
            if spec.alias_info is not None and spec.alias_info.is_write and spec.name in kwargs:
                self._spoil(kwargs[spec.name])

    def _spoil(self, given: Any) -> None:
        for one in tree_flatten(given)[0]:
            if is_fake(one) and (real := getattr(one, _KNOWN, None)) is not None:
                self._spoil_storage(real.untyped_storage())

    def _spoil_storage(self, storage: Any) -> None:
        address = int(storage._cdata)

        def gone(_: object) -> None:
            self._stale.pop(address, None)

        self._stale[address] = weakref.ref(storage, gone)

    def _answer(self, func: Any, args: Any, kwargs: Any, known: bool) -> Any:
        """The answer to a question about values: the true one where they are known, else the chosen one."""
        if known:
            real = self._really(func, args, kwargs)
            return tree_map_only(torch.Tensor, self._wrap, real)
        name = func.__name__.split(".")[0]
        if name in ("_local_scalar_dense", "item"):
            return self._scalar(args[0])
        if name in ("is_nonzero", "equal", "allclose"):
            return self._guess(False, "no")
        answer = _LARGEST.get(name)
        if answer is None:
            raise Unanswerable(str(func))
        if name != "index" or any(self._is_unknown_mask(one) for one in args[1]):
            self._guess(None, LARGEST_RESULT)
        return answer(func, self, *args, **kwargs)

    def _is_unknown_mask(self, index: Any) -> bool:
        return index is not None and index.dtype in _MASKS and self.of(index) is None

    def _wrap(self, real: Any) -> Any:
        with outside():
            fake = as_fake(self.mode, real)
        self.know(fake, real)
        return fake

    def _scalar(self, tensor: Any) -> Any:
        if tensor.dtype == torch.bool:
            return self._guess(False, "no")
        # A number that is no count hardly ever says how much memory is needed: not worth a note.
        return 1.0 if tensor.is_floating_point() else self._guess(1, "1")

    def _guess(self, value: Any, text: str) -> Any:
        self.guesses.setdefault(location(creating_lines()) or "an unknown line", text)
        return value


def _all_of(func: Any, values: Values, mask: Any) -> Any:
    return mask.new_empty((mask.numel(), mask.dim()), dtype=torch.int64)


def _all_selected(func: Any, values: Values, tensor: Any, mask: Any) -> Any:
    shape = torch.broadcast_shapes(tensor.shape, mask.shape)
    return tensor.new_empty((shape.numel(),))


def _all_indexed(func: Any, values: Values, tensor: Any, indices: Any) -> Any:
    """``tensor[mask]``: each mask stands for as many positions as it has elements, or is known to select."""
    integer: list[Any] = []
    for index in indices:
        if index is None or index.dtype not in _MASKS:
            integer.append(index)
            continue
        real = values.of(index)
        count = index.numel() if real is None else _count(real)
        integer += [index.new_empty((count,), dtype=torch.int64) for _ in range(index.dim())]
    return func(tensor, integer)


def _count(real: Any) -> int:
    with outside():
        return int(torch.count_nonzero(real))


def _all_different(func: Any, values: Values, tensor: Any, *args: Any, **kwargs: Any) -> Any:
    positions = tensor.new_empty(tensor.shape, dtype=torch.int64)
    counts = tensor.new_empty((tensor.numel(),), dtype=torch.int64)
    return tensor.new_empty((tensor.numel(),)), positions, counts


def _ctc(func: Any, values: Values, log_probs: Any, targets: Any, *args: Any, **kwargs: Any) -> Any:
    """The loss of each sequence, and a table of every time step by every target with blanks between."""
    length, batch = (
        (log_probs.shape[0], log_probs.shape[1]) if log_probs.dim() == 3 else (log_probs.shape[0], 1)
    )
    longest = targets.shape[1] if targets.dim() == 2 else targets.shape[0]
    return log_probs.new_empty((batch,)), log_probs.new_empty((batch, length, 2 * longest + 1))


_LARGEST: dict[str, Callable[..., Any]] = {
    "_ctc_loss": _ctc,
    "nonzero": _all_of,
    "masked_select": _all_selected,
    "index": _all_indexed,
    "_unique2": _all_different,
}


def grouped_product(func: Any, left: Any, right: Any, *args: Any) -> Any:
    """The result of aten's ``_grouped_mm``: its fake implementation refuses float32, the real one does not.

    left (rows, k) or (groups, rows, k), right (groups, k, columns) or (k, columns); two matrices give one
    product a group.
    """
    groups = () if left.dim() + right.dim() == 5 else (args[0].numel() if left.dim() == 2 else left.shape[0],)
    return left.new_empty((*groups, left.shape[-2], right.shape[-1]))


def _tensors(tree: Any) -> list[Any]:
    return [one for one in tree_flatten(tree)[0] if isinstance(one, torch.Tensor)]


def _is_small(tensor: Any) -> bool:
    return bool(tensor.numel() <= (MOST_FLOATS if tensor.is_floating_point() else MOST_NUMBERS))


def _storage(real: Any) -> int:
    return int(real.untyped_storage()._cdata)
