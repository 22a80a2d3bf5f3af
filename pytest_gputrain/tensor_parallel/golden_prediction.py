"""Which collectives a style makes, forward and backward, told from placements and what comes in.

By DTensor's rules: a part gathered is an ``all_gather``, a pending sum an ``all_reduce`` or, into parts, a
``reduce_scatter``, parts of another dimension an ``all_to_all``; whole to part costs nothing. The gradient of
a pending sum is whole on every rank, that of a whole input of divided outputs is a pending sum.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard
from torch.distributed.tensor import parallel as torch_styles
from torch.distributed.tensor.placement_types import Placement

from pytest_gputrain.tensor_parallel import conv1d, sequence, styles

Kinds = tuple[str, ...]
WHOLE, SUM = Replicate(), Partial()


@dataclass(frozen=True)
class Predicted:
    """Of one call. may: so many more backward, where what follows decides."""

    forward: Kinds = ()
    backward: Kinds = ()
    may: int = 0

    def __add__(self, other: Predicted) -> Predicted:
        return Predicted(self.forward + other.forward, self.backward + other.backward, self.may + other.may)


@dataclass(frozen=True)
class Call:
    """A module's call: what it was given before any style's hook, and what it made before any.

    has_columns: whether column layers are directly in the module, which leave sums of their input pending.
    """

    module: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Any
    has_columns: bool = False

    @property
    def first(self) -> Any:
        """The first tensor, by position or by name."""
        return next((v for v in (*self.args, *self.kwargs.values()) if isinstance(v, torch.Tensor)), None)


def predict(style: Any, call: Call) -> Predicted | None:
    """None for a style that is not known, or an input that it does not expect."""
    rule = _RULES.get(type(style))
    return None if rule is None or call.first is None else rule(style, call)


def moved(before: Placement, after: Placement, dims: int = 0) -> Kinds:
    """The collective of a redistribution; ``dims``: of the tensor, for dimensions counted from its end."""
    if _is_sum(before):
        return () if _is_sum(after) else ("reduce_scatter",) if after.is_shard() else ("all_reduce",)
    if not before.is_shard() or _is_sum(after):
        return ()
    if not after.is_shard():
        return ("all_gather",)
    return () if _dim(before, dims) == _dim(after, dims) else ("all_to_all",)


def _is_sum(placement: Placement) -> bool:
    return placement.is_partial()


def _dim(placement: Any, dims: int) -> int:
    dim: int = placement.dim
    return dim + dims if dim < 0 else dim


def _given(x: Any, declared: Placement) -> Placement:
    return x.placements[0] if isinstance(x, DTensor) else declared


def _same(one: Placement, other: Placement, dims: int) -> bool:
    both_cut = one.is_shard() and other.is_shard()
    return (both_cut and _dim(one, dims) == _dim(other, dims)) or one == other


def _gradient_of(placement: Placement) -> Placement:
    return WHOLE if _is_sum(placement) else placement


def _wanted(x: Any) -> bool:
    return bool(x.requires_grad and torch.is_grad_enabled())


def _colwise(style: Any, call: Call) -> Predicted | None:
    x, declared, out = call.first, style.input_layouts[0], style.output_layouts[0]
    given, opened = _given(x, declared), declared != WHOLE
    if _is_sum(given) or _is_sum(out) or (not opened and given != WHOLE):
        return None
    is_linear = isinstance(call.module, nn.Linear)
    dims = x.dim() + (not is_linear)
    forward = (moved(given, WHOLE) if opened else ()) + moved(Shard(-1), out, dims)
    backward = moved(out, Shard(-1), dims)
    if is_linear and _wanted(x) and (opened or not isinstance(x, DTensor)):
        backward += moved(SUM, given)
    return Predicted(forward, backward, _open_end(style))


def _open_end(style: Any) -> int:
    """A distributed output's gradient comes as what follows makes it."""
    return 0 if style.use_local_output else 2


def _rowwise(style: Any, call: Call) -> Predicted | None:
    x, declared, out = call.first, style.input_layouts[0], style.output_layouts[0]
    is_linear = isinstance(call.module, nn.Linear)
    desired: Placement = Shard(-1) if is_linear else WHOLE
    given, opened = _given(x, declared), declared != desired
    if _is_sum(given) or _is_sum(out) or (not opened and not _same(given, desired, x.dim())):
        return None
    forward = (moved(given, desired, x.dim()) if opened else ()) + moved(SUM, out)
    backward = moved(out, WHOLE)
    if is_linear and opened and _wanted(x):
        backward += moved(desired, given, x.dim())
    return Predicted(forward, backward, _open_end(style))


def _sequence(style: Any, call: Call) -> Predicted | None:
    x, cut = call.first, style.sequence_sharding[0]
    given = _given(x, cut)
    backward = moved(cut, _gradient_of(given), x.dim()) if _wanted(x) else ()
    # The gradients of its parameters are pending sums, which a plan may settle.
    may = sum(1 for _ in call.module.parameters()) + _open_end(style)
    return Predicted(moved(given, cut, x.dim()), backward, may)


def _prepare_input(style: Any, call: Call) -> Predicted | None:
    places = list(zip(call.args, style.input_layouts or (), style.desired_input_layouts or (), strict=False))
    named = style.desired_input_kwarg_layouts
    places += [
        (call.kwargs[name], layout, named.get(name))
        for name, layout in style.input_kwarg_layouts.items()
        if name in call.kwargs
    ]
    made = Predicted()
    for x, declared, desired in places:
        if isinstance(x, torch.Tensor) and declared is not None and desired is not None:
            made += _prepared(style, call, x, declared, desired)
    return made


def _prepared(style: Any, call: Call, x: Any, declared: Any, desired: Any) -> Predicted:
    given, opened = _given(x, declared), declared != desired
    forward = moved(given, desired, x.dim()) if opened else ()
    if not _wanted(x):
        return Predicted(forward)
    if not style.use_local_output:
        if desired == WHOLE and call.has_columns and (opened or not isinstance(x, DTensor)):
            return Predicted(forward, moved(SUM, given), 1)
        # As what follows makes it.
        return Predicted(forward, (), 2)
    return Predicted(forward, moved(desired, _gradient_of(given), x.dim()) if opened else ())


def _prepare_output(style: Any, call: Call) -> Predicted | None:
    outputs = call.output if isinstance(call.output, tuple) else (call.output,)
    made = Predicted()
    for y, declared, desired in zip(
        outputs, style.output_layouts, style.desired_output_layouts, strict=False
    ):
        if not isinstance(y, torch.Tensor) or declared is None:
            continue
        given, opened = _given(y, declared), declared != desired
        back = moved(desired, _gradient_of(given), y.dim()) if opened and _wanted(y) else ()
        made += Predicted(
            moved(given, desired, y.dim()) if opened else (),
            back if style.use_local_output else (),
            0 if style.use_local_output else 2,
        )
    return made


def _prepare_both(style: Any, call: Call) -> Predicted | None:
    before = _prepare_input(style.prepare_module_input, call)
    after = _prepare_output(style.prepare_module_output, call)
    return before + after if before is not None and after is not None else None


# The package's own.


def _replicated(style: Any, call: Call) -> Predicted:
    own = [p for p in call.module.parameters(recurse=False) if p.requires_grad and torch.is_grad_enabled()]
    return Predicted((), ("all_reduce",) * len(own) if style.summed else ())


def _key_value(style: Any, call: Call) -> Predicted | None:
    whole: Any = next(call.module.parameters())
    if whole.placements[0].is_shard():
        return _colwise(style, call)
    # Each rank's head is taken from a whole output; its gradient is gathered again.
    return Predicted(moved(_given(call.first, style.input_layouts[0]), WHOLE), ("all_gather",))


def _sequence_layer(style: Any, call: Call) -> Predicted:
    back = ("all_gather",) if style.first and _wanted(call.first) else ()
    return Predicted(("all_gather",) if style.last else (), back)


def _gathered(style: Any, call: Call) -> Predicted:
    return Predicted(("all_gather",), ("reduce_scatter",) if _wanted(call.first) else ())


def _conv1d_columns(style: Any, call: Call) -> Predicted:
    summed = _wanted(call.first) and not isinstance(call.first, DTensor)
    return Predicted((), ("all_reduce",) if summed else ())


def _conv1d_row(style: Any, call: Call) -> Predicted:
    if style.sequence is None:
        return Predicted(("all_reduce",))
    return Predicted(("reduce_scatter",), ("all_gather", "all_reduce"))


def _sequence_row(style: Any, call: Call) -> Predicted:
    return Predicted(("reduce_scatter",), ("all_gather",))


# By the class itself: what a subclass overrides is not known.
_RULES: dict[type[Any], Callable[[Any, Call], Predicted | None]] = {
    torch_styles.ColwiseParallel: _colwise,
    torch_styles.RowwiseParallel: _rowwise,
    torch_styles.SequenceParallel: _sequence,
    torch_styles.PrepareModuleInput: _prepare_input,
    torch_styles.PrepareModuleOutput: _prepare_output,
    torch_styles.PrepareModuleInputOutput: _prepare_both,
    styles.Replicated: _replicated,
    styles.KeyValueParallel: _key_value,
    sequence.SequenceLayer: _sequence_layer,
    sequence.SequenceGather: _gathered,
    sequence.SequenceColwise: _gathered,
    sequence.SequenceRowwise: _sequence_row,
    conv1d.Conv1DColwise: _conv1d_columns,
    conv1d.Conv1DRowwise: _conv1d_row,
}
