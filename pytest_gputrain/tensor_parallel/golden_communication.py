"""Which layer communicates, and how often, forward and backward; and whether that is what the plan says."""

from __future__ import annotations

import weakref
from collections import Counter
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from pytest_gputrain.tensor_parallel.golden_account import layer_of
from pytest_gputrain.tensor_parallel.golden_outputs import ask
from pytest_gputrain.tensor_parallel.golden_pair import Pair
from pytest_gputrain.tensor_parallel.golden_prediction import Call, Predicted, predict
from pytest_gputrain.tensor_parallel.golden_styles import Applied
from pytest_gputrain.tensor_parallel.records import CommunicationRecord, Finding, LayerCollectives
from pytest_gputrain.trace.names import canonical_name

Counts = dict[str, tuple[int, int]]


@dataclass
class Made:
    """Of one module in one step: kinds of collectives, and what the plan predicts of them.

    unknown: a style that is not known, or a forward that runs again in backward (checkpointing): no
    prediction then. may: how many more the plan's backward may make.
    """

    forward: Counter[str] = field(default_factory=Counter)
    backward: Counter[str] = field(default_factory=Counter)
    planned_forward: Counter[str] = field(default_factory=Counter)
    planned_backward: Counter[str] = field(default_factory=Counter)
    may: int = 0
    unknown: bool = False

    def add(self, other: Made) -> None:
        self.forward += other.forward
        self.backward += other.backward
        self.planned_forward += other.planned_forward
        self.planned_backward += other.planned_backward
        self.may += other.may
        self.unknown |= other.unknown


class _Counting(TorchDispatchMode):
    """Counts collectives by the module that runs, forward, or whose output's gradient came last, backward.

    Not torch's CommDebugMode, which a module that is called twice in one forward (a dropout) breaks.
    """

    _NONE = ("wait_tensor", "_wrap_tensor_autograd", "barrier", "monitored_barrier_")

    def __init__(self, model: nn.Module, applied: list[Applied]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.made: dict[str, Made] = {}
        self._applied: dict[int, list[Applied]] = {}
        for one in applied:
            self._applied.setdefault(id(one.module), []).append(one)
        self._stack: list[str] = [""]
        self._calls: list[Call | None] = []
        self._called: set[int] = set()
        self._outputs: dict[int, tuple[Any, str]] = {}
        self._behind: str | None = None
        self._handles: list[Any] = []
        for name, module in model.named_modules():
            own = canonical_name(name)
            # Around a plan's own hooks, which communicate: before the first and behind the last of them.
            self._handles += [
                module.register_forward_pre_hook(partial(self._enter, own), prepend=True, with_kwargs=True),
                module.register_forward_hook(partial(self._computed, own), prepend=True),
                module.register_forward_hook(partial(self._leave, own)),
            ]

    def of(self, name: str) -> Made:
        return self.made.setdefault(name, Made())

    def _enter(self, name: str, module: Any, args: Any, kwargs: Any) -> None:
        self._stack.append(name)
        self._called.add(id(module))
        styles = self._applied.get(id(module))
        if styles and self._behind is not None:
            self.of(name).unknown = True
        columns = any(isinstance(a.style, _COLUMNS) for m in module.children() for a in self._at(m))
        self._calls.append(Call(module, args, kwargs, None, columns) if styles else None)

    def _at(self, module: Any) -> list[Applied]:
        return self._applied.get(id(module), [])

    def _computed(self, name: str, module: Any, args: Any, output: Any) -> None:
        call = self._calls[-1] if self._calls else None
        if call is not None:
            self._calls[-1] = Call(module, call.args, call.kwargs, output, call.has_columns)

    def _leave(self, name: str, module: Any, args: Any, output: Any) -> None:
        del self._stack[-1:]
        call = self._calls.pop() if self._calls else None
        backward: list[Predicted] = []
        if call is not None:
            backward = self._predict(name, call)
        # Of tuples only where something is predicted: a cache of keys is an output of every module above.
        outputs = output if isinstance(output, tuple) and backward else (output,)
        for tensor in outputs:
            if isinstance(tensor, torch.Tensor) and tensor.requires_grad:
                # The innermost module's, where the ones around it hand the same tensor on.
                known = self._outputs.get(id(tensor))
                owner = name if known is None or known[0]() is not tensor else known[1]
                self._outputs[id(tensor)] = weakref.ref(tensor), owner
                tensor.register_hook(partial(self._backward, owner, name, backward))

    def _predict(self, name: str, call: Call) -> list[Predicted]:
        """Adds what is made forward; returns what is made backward, once a gradient comes."""
        made = self.of(name)
        found = [predict(one.style, call) for one in self._at(call.module) if one.mesh.size() > 1]
        made.unknown |= any(one is None for one in found)
        known = [one for one in found if one is not None]
        made.planned_forward.update(kind for one in known for kind in one.forward)
        return known

    def _backward(self, owner: str, name: str, predicted: list[Predicted], gradient: Any) -> None:
        self._behind = owner
        made = self.of(name)
        for one in predicted:
            made.planned_backward.update(one.backward)
            made.may += one.may
        predicted.clear()

    def passed_by(self, model: nn.Module) -> list[str]:
        """Modules with a style and a gradient, and no call: somebody else reads their weights."""
        return [
            canonical_name(name)
            for name, module in model.named_modules()
            if self._at(module)
            and id(module) not in self._called
            and any(p.grad is not None for p in module.parameters(recurse=False))
        ]

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        from torch.distributed.tensor import DTensor

        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # it comes again as what it is made of
        namespace, _, name = func.name().partition("::")
        if namespace in ("c10d", "_c10d_functional", "_dtensor") and name.partition(".")[0] not in self._NONE:
            made = self.of(self._behind or self._stack[-1])
            (made.forward if self._behind is None else made.backward)[_kind(name)] += 1
        return func(*args, **(kwargs or {}))


def _columns() -> tuple[type[Any], ...]:
    from torch.distributed.tensor.parallel import ColwiseParallel

    return (ColwiseParallel,)


_COLUMNS = _columns()


def _kind(name: str) -> str:
    """all_reduce of c10d's ``allreduce_`` and of ``_c10d_functional``'s ``all_reduce_coalesced``."""
    plain = name.replace("_", "").lower()
    for kind in ("all_reduce", "all_gather", "reduce_scatter", "all_to_all", "broadcast"):
        if kind.replace("_", "") in plain:
            return kind
    return name


def communication(pair: Pair, batch: Any) -> tuple[dict[str, Made], list[str]]:
    """By module, its own collectives in forward and in backward, of one step; and modules with a style that
    were not called, although their weights got gradients.
    """
    counting = _Counting(pair.parallel, pair.applied)
    try:
        with pair.world.acting(), counting:
            ask(pair.case, pair.parallel, batch, pair.seed, gradients=True)
        passed_by = counting.passed_by(pair.parallel)
    finally:
        counting.remove()
        pair.parallel.zero_grad(set_to_none=True)
    return counting.made, passed_by


def by_layer(made: dict[str, Made], layers: list[str]) -> dict[str, Made]:
    """Of each layer, all that is in it."""
    found = {}
    for layer in layers:
        found[layer] = Made()
        for name, one in made.items():
            if name == layer or name.startswith(f"{layer}."):
                found[layer].add(one)
    return found


def against_plan(pair: Pair, batch: Any) -> CommunicationRecord:
    """Each layer's collectives of one step beside what the plan predicts of them; collective.

    Not judged: layers with a style that is not known, and those that run again in backward.
    """
    try:
        made, passed_by = communication(pair, batch)
    except Exception as error:  # a model that does not bear to be watched
        why = f"collectives could not be counted: {type(error).__name__}: {error!s:.60}"
        return CommunicationRecord(problem=None, why=why)
    names = {id(module): canonical_name(name) for name, module in pair.parallel.named_modules()}
    planned = [names[id(one.module)] for one in pair.applied if names.get(id(one.module))]
    layers = list(dict.fromkeys(layer_of(f"{name}.weight") for name in planned))
    rows = tuple(_row(layer, one) for layer, one in by_layer(made, layers).items() if not one.unknown)
    # Ranks of one plan make the same; the first one that does not speaks for all.
    by_rank = pair.world.merged(dict.fromkeys(pair.world.held, rows))
    rows = next((one for one in by_rank if any(row.departs for row in one)), by_rank[0])
    why = "" if pair.applied else "no plan is known that could predict them: no ParallelStyle was applied"
    absent = next((row for row in rows if row.absent), None)
    total = (
        sum(one.forward.total() for one in made.values()),
        sum(o.backward.total() for o in made.values()),
    )
    return CommunicationRecord(rows, total, why, absent.text() if absent else None, tuple(passed_by))


def _row(layer: str, made: Made) -> LayerCollectives:
    return LayerCollectives(
        layer,
        dict(made.forward),
        dict(made.backward),
        dict(made.planned_forward),
        dict(made.planned_backward),
        made.may,
    )


def silent_layers(pair: Pair, batch: Any) -> list[Finding]:
    """Layers with sharded weights that never communicate, and layers unlike their siblings; collective."""
    try:
        counts, _ = communication(pair, batch)
    except Exception as error:  # a model that does not bear to be watched: its layers go uncounted
        pair.notes.append(f"collectives could not be counted: {type(error).__name__}: {error!s:.60}")
        return []
    sharded = [record for record in pair.weights.records if record.kind != "replicated"]
    layers = list(dict.fromkeys(layer_of(record.held_as[0]) for record in sharded if record.held_as))
    found = {
        layer: (one.forward.total(), one.backward.total()) for layer, one in by_layer(counts, layers).items()
    }
    silent = [layer for layer, (forward, backward) in found.items() if not forward + backward]
    findings = [
        Finding(
            "no_communication",
            layer,
            f"{layer} has sharded weights and makes no collective, neither forward nor backward",
        )
        for layer in silent
    ]
    return findings + _unlike(found)


def _unlike(found: Counts) -> list[Finding]:
    """Numbered layers whose counts are not their siblings'; the ends differ for good reasons."""
    groups: dict[str, list[str]] = {}
    for layer in found:
        stem, _, number = layer.rpartition(".")
        if number.isdigit():
            groups.setdefault(stem, []).append(layer)
    unlike = []
    for layers in groups.values():
        common = Counter(found[layer] for layer in layers).most_common(1)[0]
        for layer in layers[1:-1]:
            if common[1] > len(layers) // 2 and found[layer] != common[0]:
                now, usual = found[layer], common[0]
                unlike.append(
                    Finding(
                        "other_communication",
                        layer,
                        f"{layer} makes {now[0]} collectives forward and {now[1]} backward, "
                        f"its siblings {usual[0]} and {usual[1]}",
                        {"forward": now[0], "backward": now[1]},
                        fails=False,
                    )
                )
    return unlike
