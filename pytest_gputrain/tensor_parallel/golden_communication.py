"""Which layer communicates, and how often, forward and backward."""

from __future__ import annotations

from collections import Counter
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from pytest_gputrain.tensor_parallel.golden_account import layer_of
from pytest_gputrain.tensor_parallel.golden_outputs import ask
from pytest_gputrain.tensor_parallel.golden_pair import Pair
from pytest_gputrain.tensor_parallel.records import Finding
from pytest_gputrain.trace.names import canonical_name

Counts = dict[str, tuple[int, int]]


class _Counting(TorchDispatchMode):
    """Counts collectives by the module that runs, forward, or whose output's gradient came last, backward.

    Not torch's CommDebugMode, which a module that is called twice in one forward (a dropout) breaks.
    """

    _NONE = ("wait_tensor", "barrier", "monitored_barrier_")

    def __init__(self, model: nn.Module) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.counts: dict[str, list[int]] = {}
        self._stack: list[str] = [""]
        self._behind: str | None = None
        self._handles: list[Any] = []
        for name, module in model.named_modules():
            self._handles.append(module.register_forward_pre_hook(partial(self._enter, canonical_name(name))))
            self._handles.append(module.register_forward_hook(partial(self._leave, canonical_name(name))))

    def _enter(self, name: str, module: Any, args: Any) -> None:
        self._stack.append(name)

    def _leave(self, name: str, module: Any, args: Any, output: Any) -> None:
        del self._stack[-1:]
        if isinstance(output, torch.Tensor) and output.requires_grad:
            output.register_hook(partial(self._backward, name))

    def _backward(self, name: str, gradient: Any) -> None:
        self._behind = name

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        from torch.distributed.tensor import DTensor

        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # it comes again as what it is made of
        namespace, _, name = func.name().partition("::")
        if namespace in ("c10d", "_c10d_functional", "_dtensor") and name.partition(".")[0] not in self._NONE:
            backward = self._behind is not None
            count = self.counts.setdefault(self._behind or self._stack[-1], [0, 0])
            count[backward] += 1
        return func(*args, **(kwargs or {}))


def communication(pair: Pair, batch: Any) -> Counts:
    """By module, its own collectives in forward and in backward, of one step."""
    counting = _Counting(pair.parallel)
    try:
        with pair.world.acting(), counting:
            ask(pair.case, pair.parallel, batch, pair.seed, gradients=True)
    finally:
        counting.remove()
    return {name: (count[0], count[1]) for name, count in counting.counts.items()}


def by_layer(counts: Counts, layers: list[str]) -> Counts:
    """Of each layer, all that is in it."""
    found = {}
    for layer in layers:
        inside = [name for name in counts if name == layer or name.startswith(f"{layer}.")]
        found[layer] = (sum(counts[name][0] for name in inside), sum(counts[name][1] for name in inside))
    return found


def silent_layers(pair: Pair, batch: Any) -> list[Finding]:
    """Layers with sharded weights that never communicate, and layers unlike their siblings; collective."""
    try:
        counts = communication(pair, batch)
    except Exception as error:  # a model that does not bear to be watched: its layers go uncounted
        pair.notes.append(f"collectives could not be counted: {type(error).__name__}: {error!s:.60}")
        return []
    sharded = [record for record in pair.weights.records if record.kind != "replicated"]
    layers = list(dict.fromkeys(layer_of(record.held_as[0]) for record in sharded if record.held_as))
    found = by_layer(counts, layers)
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
