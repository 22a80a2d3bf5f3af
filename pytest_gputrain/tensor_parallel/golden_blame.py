"""Which layer is at fault, going backward: the one whose output gets the right gradient, and whose input
does not.

Both models run once more with every module's inputs and outputs watched, only where a gradient is wrong.
A module's input is watched by a view of its own, so that what it alone gives back is seen, and not the sum
over all users of a tensor.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from pytest_gputrain.case import TrainingCase
from pytest_gputrain.tensor_parallel import golden_difference as apart
from pytest_gputrain.tensor_parallel.golden_outputs import ask
from pytest_gputrain.tensor_parallel.golden_reasons import explain
from pytest_gputrain.tensor_parallel.records import GradientRecord, LayerRecord
from pytest_gputrain.trace.names import canonical_name

if TYPE_CHECKING:
    from pytest_gputrain.tensor_parallel.golden_pair import Pair

Blame = tuple[list[LayerRecord], str | None, str]


class _Watch:
    """Every leaf module's first output, and its gradient and that of its first input, by name.

    The first call of each counts.
    """

    def __init__(self, model: nn.Module) -> None:
        self.order: list[str] = []
        self.inputs: dict[str, Any] = {}
        self.outputs: dict[str, Any] = {}
        self.values: dict[str, Any] = {}
        self._handles: list[Any] = []
        for name, module in model.named_modules():
            if name and not any(True for _ in module.children()):
                self._watch(canonical_name(name), module)

    def _watch(self, name: str, module: nn.Module) -> None:
        def before(module: Any, args: tuple[Any, ...]) -> Any:
            if name in self.order or not args or not _tracked(args[0]):
                return None
            own = args[0].view_as(args[0])
            own.register_hook(_keep(self.inputs, name))
            return (own, *args[1:])

        def after(module: Any, args: Any, output: Any) -> None:
            if name not in self.order:
                self.order.append(name)
                if isinstance(output, torch.Tensor) and output.is_floating_point():
                    self.values[name] = output.detach()
                if _tracked(output):
                    output.register_hook(_keep(self.outputs, name))

        # Before a plan's own hooks: the input as it comes, the output as it goes.
        self._handles.append(module.register_forward_pre_hook(before, prepend=True))
        self._handles.append(module.register_forward_hook(after))

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()


def _keep(into: dict[str, Any], name: str) -> Callable[[Any], None]:
    def hook(gradient: Any) -> None:
        into.setdefault(name, gradient.detach())

    return hook


def _tracked(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.requires_grad


def _watched(case: TrainingCase, model: nn.Module, batch: Any, seed: int) -> _Watch:
    watch = _Watch(model)
    model.zero_grad(set_to_none=True)
    try:
        ask(case, model, batch, seed, gradients=True)
    finally:
        watch.remove()
        model.zero_grad(set_to_none=True)
    return watch


def blame(pair: Pair, batch: Any, records: list[GradientRecord]) -> Blame:
    """Layers in backward's order, the one at fault and why; empty where none is. Collective."""
    wrong = next((record for record in records if record.problem), None)
    if wrong is None:
        return [], None, ""
    if pair.weights.problem or pair.problem:
        return [], wrong.layer, wrong.cause
    layers = _layers(pair, batch)
    index = next((i for i, layer in enumerate(layers) if layer.name == wrong.layer), None)
    if index is None or _right(layers[index].output_gradient, wrong):
        return layers, wrong.layer, wrong.cause
    # From the first wrong parameter towards the output, over what is unknown, up to what is right.
    guilty = None
    for layer in reversed(layers[:index]):
        if layer.input_gradient is not None and not _right(layer.input_gradient, wrong):
            guilty = layer
        if _right(layer.output_gradient, wrong) or _right(layer.input_gradient, wrong):
            break
    if guilty is None:
        return layers, wrong.layer, wrong.cause
    return layers, guilty.name, guilty.cause or wrong.cause


def depart_forward(pair: Pair, batch: Any) -> tuple[str | None, str]:
    """The first leaf module, going forward, whose output is not the reference's, and why; collective."""
    watches = _watch_both(pair, batch)
    if watches is None:
        return None, ""
    golden, parallel = watches
    for name in golden.order:
        off, cause = _compare(pair, golden.values.get(name), parallel.values.get(name), "output")
        if off is not None and off > 10 * apart.tolerance(
            apart.GRADIENT_TOLERANCE, golden.values[name].dtype
        ):
            again = _bias_again(pair, name, golden.values[name], parallel.values[name])
            return name, again or cause
    return None, ""


def _bias_again(pair: Pair, name: str, wanted: Any, got: Any) -> str:
    """Whether what is too much is the layer's bias, once more or several times; collective."""
    bias = getattr(pair.reference.get_submodule(name), "bias", None)
    pieces = pair.world.whole(got)
    times: dict[int, float | None] = dict.fromkeys(pieces)
    if isinstance(bias, torch.Tensor) and bias.dim() == 1 and wanted.shape[-1] == bias.numel():
        for rank, piece in pieces.items():
            extra = (piece - wanted).double()
            added = bias.detach().double().expand_as(extra)
            scale = float((extra * added).sum() / (added * added).sum())
            if apart.difference(scale * added, extra).relative < 1e-2:
                times[rank] = 1 + scale
    found = pair.world.merged(times)
    if any(one is None for one in found):
        return ""
    return f"its bias is added {found[0]:.3g} times: on every rank, before the sum over ranks"


def _right(relative: float | None, record: GradientRecord) -> bool:
    return relative is not None and relative <= 10 * record.tolerance


def _watch_both(pair: Pair, batch: Any) -> tuple[_Watch, _Watch] | None:
    try:
        with pair.world.alone():
            golden = _watched(pair.case, pair.reference, batch, pair.seed)
        with pair.world.acting():
            parallel = _watched(pair.case, pair.parallel, batch, pair.seed)
    except Exception as error:  # a module that does not bear to be watched: the answer is less precise
        pair.notes.append(f"layers could not be watched: {type(error).__name__}: {error!s:.80}")
        return None
    return golden, parallel


def _layers(pair: Pair, batch: Any) -> list[LayerRecord]:
    watches = _watch_both(pair, batch)
    if watches is None:
        return []
    golden, parallel = watches
    known = {name for name in golden.order if name in parallel.order}
    return [_layer(pair, name, golden, parallel) for name in reversed(golden.order) if name in known]


def _layer(pair: Pair, name: str, golden: _Watch, parallel: _Watch) -> LayerRecord:
    output, _ = _compare(pair, golden.outputs.get(name), parallel.outputs.get(name), "output gradient")
    entry, cause = _compare(pair, golden.inputs.get(name), parallel.inputs.get(name), "input gradient")
    return LayerRecord(name, output, entry, cause)


def _compare(pair: Pair, wanted: Any, got: Any, what: str) -> tuple[float | None, str]:
    """The worst rank's relative error and why; None where it cannot be said. Collective."""
    world = pair.world
    here = got is not None and wanted is not None
    if not all(world.merged(dict.fromkeys(world.held, here))):
        return None, ""
    pieces = world.whole(got)
    fits = world.merged({rank: piece.shape == wanted.shape for rank, piece in pieces.items()})
    if not all(fits):
        return None, ""
    off = world.merged({r: apart.difference(wanted, piece).relative for r, piece in pieces.items()})
    cause = ""
    if max(off) > 10 * apart.tolerance(apart.GRADIENT_TOLERANCE, wanted.dtype):
        own = {rank: (wanted, piece) for rank, piece in pieces.items()}
        cause = explain(own, world, replicated=True, what=what)
    return max(off), cause
