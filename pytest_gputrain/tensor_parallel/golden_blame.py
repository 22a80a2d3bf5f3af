"""Which layer is at fault, going backward: the one whose output gets the right gradient, and whose input
does not.

Both models run once more with every module's inputs and outputs watched, only where a gradient is wrong.
A module's input is watched by a view of its own, so that what it alone gives back is seen, and not the sum
over all users of a tensor.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from pytest_gputrain.tensor_parallel import golden_difference as apart
from pytest_gputrain.tensor_parallel.golden_gather import assemble
from pytest_gputrain.tensor_parallel.golden_reasons import explain
from pytest_gputrain.tensor_parallel.golden_watch import Watch, module_of, watched
from pytest_gputrain.tensor_parallel.records_backward import GradientRecord, LayerRecord

if TYPE_CHECKING:
    from pytest_gputrain.tensor_parallel.golden_pair import Pair

Blame = tuple[list[LayerRecord], str | None, str]


def blame(pair: Pair, batch: Any, records: list[GradientRecord]) -> Blame:
    """Layers in backward's order, the one at fault and why; empty where none is. Collective."""
    wrong = next((record for record in records if record.problem), None)
    if wrong is None:
        return [], None, ""
    if pair.weights.problem or pair.problem:
        return [], wrong.layer, wrong.cause
    watches = _watch_both(pair, batch)
    if watches is None:
        return [], wrong.layer, wrong.cause
    golden, parallel = watches
    layers = _layers(pair, golden, parallel)
    calls = [i for i, layer in enumerate(layers) if module_of(layer.name) == wrong.layer]
    if not calls or all(_right(layers[i].output_gradient, wrong) for i in calls):
        return layers, wrong.layer, wrong.cause
    # The first one, going backward, that is known to be sent a wrong gradient; else the first, going forward.
    at = next((i for i in calls if _wrong(layers[i].output_gradient, wrong)), calls[-1])
    name = layers[at].name
    guilty = _sender(name, wrong, _behind(golden, name, layers[:at]), golden)
    if guilty is None:
        return layers, wrong.layer, wrong.cause
    return layers, guilty.name, guilty.cause or wrong.cause


def _behind(golden: Watch, name: str, layers: list[LayerRecord]) -> list[LayerRecord]:
    """Those that depend on its output, in forward's order; all where that cannot be said."""
    behind = golden.behind(name)
    return [layer for layer in reversed(layers) if layer.name in behind or not behind]


def _sender(name: str, wrong: GradientRecord, behind: list[LayerRecord], golden: Watch) -> LayerRecord | None:
    """The layer that sends the wrong gradient back to that one; None where it is its own."""
    # Of several that read its output (branches), the one that is known to.
    readers = [i for i, layer in enumerate(behind) if golden.reads.get(layer.name) == name]
    first = next((i for i in readers if _wrong(behind[i].input_gradient, wrong)), None)
    guilty = None if first is None else behind[first]
    # From the first wrong parameter towards the output, over what is unknown, up to what is right.
    for layer in behind[0 if first is None else first + 1 :]:
        if _wrong(layer.input_gradient, wrong):
            guilty = layer
        if _right(layer.output_gradient, wrong) or _right(layer.input_gradient, wrong):
            break
    return guilty


def depart_forward(pair: Pair, batch: Any) -> tuple[str | None, str]:
    """The first leaf module, going forward, whose output is not the reference's, and why; collective."""
    watches = _watch_both(pair, batch)
    if watches is None:
        return None, ""
    golden, parallel = watches
    for name in golden.order:
        off, cause = _compare(pair, golden.values.get(name), parallel.values.get(name), "output")
        if off is not None and off > _most_off(pair, golden.values[name].dtype):
            again = _bias_again(pair, name, golden.values[name], parallel.values[name])
            return name, again or cause
    return None, ""


def _most_off(pair: Pair, dtype: torch.dtype) -> float:
    """By how much of its norm an activation or its gradient may be off and be right."""
    kind = pair.computes_in(dtype)
    allowed = apart.tolerance(apart.GRADIENT_TOLERANCE, kind)
    return allowed if kind in apart.SHORT else 10 * allowed


def _bias_again(pair: Pair, name: str, wanted: Any, got: Any) -> str:
    """Whether what is too much is the layer's bias, once more or several times; collective."""
    bias = getattr(pair.reference.get_submodule(module_of(name)), "bias", None)
    pieces = _in_one_piece(pair, wanted, got, None) or {}
    if not pieces:
        return ""
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


def _wrong(relative: float | None, record: GradientRecord) -> bool:
    return relative is not None and not _right(relative, record)


def _watch_both(pair: Pair, batch: Any) -> tuple[Watch, Watch] | None:
    try:
        with pair.world.alone():
            golden = watched(pair.case, pair.reference, batch, pair.seed)
        with pair.world.acting():
            parallel = watched(pair.case, pair.parallel, batch, pair.seed)
    except Exception as error:  # a module that does not bear to be watched: the answer is less precise
        pair.notes.append(f"layers could not be watched: {type(error).__name__}: {error!s:.80}")
        return None
    return golden, parallel


def _layers(pair: Pair, golden: Watch, parallel: Watch) -> list[LayerRecord]:
    everywhere = pair.world.merged(dict.fromkeys(pair.world.held, parallel.order))
    # A rank may have modules that others have not: its own experts.
    known = set(golden.order).intersection(*everywhere)
    return [_layer(pair, name, golden, parallel) for name in reversed(golden.order) if name in known]


def _layer(pair: Pair, name: str, golden: Watch, parallel: Watch) -> LayerRecord:
    def beside(of: str, values: str, what: str) -> tuple[float | None, str]:
        wanted, got = (getattr(one, of).get(name) for one in (golden, parallel))
        alike = (getattr(one, values).get(name) for one in (golden, parallel))
        return _compare(pair, wanted, got, what, tuple(alike))

    output, _ = beside("outputs", "values", "output gradient")
    entry, cause = beside("inputs", "entries", "input gradient")
    return LayerRecord(name, output, entry, cause)


def _compare(
    pair: Pair, wanted: Any, got: Any, what: str, values: tuple[Any, Any] | None = None
) -> tuple[float | None, str]:
    """The worst rank's relative error and why; None where it cannot be said. Collective.

    values: what these are the gradients of. Where ranks have parts, they are joined as those parts make the
    reference's, if they do.
    """
    world = pair.world
    here = got is not None and wanted is not None
    if not all(world.merged(dict.fromkeys(world.held, here))):
        return None, ""
    pieces = _in_one_piece(pair, wanted, got, values)
    if pieces is None:
        return None, ""
    off = world.merged({r: apart.difference(wanted, piece).relative for r, piece in pieces.items()})
    cause = ""
    if max(off) > _most_off(pair, wanted.dtype):
        own = {rank: (wanted, piece) for rank, piece in pieces.items()}
        cause = explain(own, world, replicated=True, what=what)
    return max(off), cause


def _in_one_piece(
    pair: Pair, wanted: Any, got: Any, values: tuple[Any, Any] | None
) -> dict[int, torch.Tensor] | None:
    """What ranks have, of the shape that is wanted; None where that cannot be. Collective."""
    pieces = pair.world.whole(got)
    if _all(pair, {rank: piece.shape == wanted.shape for rank, piece in pieces.items()}):
        return pieces
    value, own = values or (None, None)
    known = _all(pair, dict.fromkeys(pieces, own is not None and value is not None))
    if not known or value is None:
        return _along_the_sequence(pair, wanted, got, pieces) if values is None else None
    joined = assemble(own, tuple(wanted.shape), pair.world, pair.mesh).tensors
    allowed = _most_off(pair, wanted.dtype)
    same = {
        rank: one.shape == wanted.shape and apart.difference(value, one).relative <= allowed
        for rank, one in joined.items()
    }
    if not _all(pair, same):
        return None
    pieces = assemble(got, tuple(wanted.shape), pair.world, pair.mesh).tensors
    fits = _all(pair, {rank: piece.shape == wanted.shape for rank, piece in pieces.items()})
    return pieces if fits else None


def _along_the_sequence(
    pair: Pair, wanted: Any, got: Any, pieces: dict[int, torch.Tensor]
) -> dict[int, torch.Tensor] | None:
    """Parts of (batch, length, channels), joined along the length: of positions ranks have the order that
    there is, of channels and heads nothing says in which they have them. Collective.
    """
    parts = {
        rank: wanted.dim() == one.dim() == 3 and one.shape[::2] == wanted.shape[::2]
        for rank, one in pieces.items()
    }
    if not _all(pair, parts):
        return None
    joined = assemble(got, tuple(wanted.shape), pair.world, pair.mesh).tensors
    fits = _all(pair, {rank: piece.shape == wanted.shape for rank, piece in joined.items()})
    return joined if fits else None


def _all(pair: Pair, by_rank: dict[int, bool]) -> bool:
    return all(pair.world.merged(by_rank))
