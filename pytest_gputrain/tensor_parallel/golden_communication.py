"""Which layer communicates, and how often, forward and backward; and whether that is what the plan says."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

from pytest_gputrain.tensor_parallel.golden_account import layer_of
from pytest_gputrain.tensor_parallel.golden_counting import Counting, Made
from pytest_gputrain.tensor_parallel.golden_outputs import ask
from pytest_gputrain.tensor_parallel.golden_pair import Pair
from pytest_gputrain.tensor_parallel.records import Finding
from pytest_gputrain.tensor_parallel.records_backward import CommunicationRecord, LayerCollectives
from pytest_gputrain.trace.names import canonical_name

Counts = dict[str, tuple[int, int]]


@dataclass(frozen=True)
class Communication:
    """Of one step. made: by module, its own collectives in forward and in backward. passed_by: modules with a
    style that were not called, although their weights got gradients. early: collectives that are read before
    they are waited for, a line each.
    """

    made: dict[str, Made]
    passed_by: list[str]
    early: list[str]


def communication(pair: Pair, batch: Any) -> Communication:
    counting = Counting(pair.parallel, pair.applied)
    try:
        with pair.world.acting(), counting.pending, counting:
            ask(pair.case, pair.parallel, batch, pair.seed, gradients=True)
        if not pair.case.has_own_step:  # which may wait for them before it steps
            counting.pending.left_in(p.grad for p in pair.parallel.parameters() if p.grad is not None)
        passed_by = counting.passed_by(pair.parallel)
    finally:
        counting.remove()
        pair.parallel.zero_grad(set_to_none=True)
    return Communication(counting.made, passed_by, counting.pending.early)


def used_early(pair: Pair, batch: Any) -> str | None:
    """The first collective that a rank reads before it has waited for it, in one line; collective."""
    try:
        early = communication(pair, batch).early
    except Exception:  # a model that does not bear to be watched
        early = []
    return next(
        (line for one in pair.world.merged(dict.fromkeys(pair.world.held, early)) for line in one), None
    )


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
        found = communication(pair, batch)
    except Exception as error:  # a model that does not bear to be watched
        why = f"collectives could not be counted: {type(error).__name__}: {error!s:.60}"
        return CommunicationRecord(problem=None, why=why)
    made = found.made
    early = [line for one in pair.world.merged(dict.fromkeys(pair.world.held, found.early)) for line in one]
    names = {id(module): canonical_name(name) for name, module in pair.parallel.named_modules()}
    planned = [names[id(one.module)] for one in pair.applied if names.get(id(one.module))]
    layers = list(dict.fromkeys(layer_of(f"{name}.weight") for name in planned))
    rows = tuple(_row(layer, one) for layer, one in by_layer(made, layers).items() if not one.unknown)
    # Ranks of one plan make the same; the first one that does not speaks for all.
    by_rank = pair.world.merged(dict.fromkeys(pair.world.held, rows))
    rows = next((one for one in by_rank if any(row.departs for row in one)), by_rank[0])
    why = "" if pair.applied else "no plan is known that could predict them: no ParallelStyle was applied"
    absent = next((row for row in rows if row.absent), None)
    forward = sum(one.forward.total() for one in made.values())
    backward = sum(one.backward.total() for one in made.values())
    elsewhere = sum(one.elsewhere for one in made.values())
    return CommunicationRecord(
        rows,
        (forward, backward),
        why,
        absent.text() if absent else None,
        tuple(found.passed_by),
        elsewhere,
        tuple(dict.fromkeys(early)),
    )


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
        counts = communication(pair, batch).made
    except Exception as error:  # a model that does not bear to be watched: its layers go uncounted
        pair.notes.append(f"collectives could not be counted: {type(error).__name__}: {error!s:.60}")
        return []
    sharded = [record for record in pair.weights.records if record.kind != "replicated"]
    layers = list(dict.fromkeys(layer_of(record.held_as[0]) for record in sharded if record.held_as))
    made = by_layer(counts, layers)
    found = {layer: (one.forward.total(), one.backward.total()) for layer, one in made.items()}
    # What FSDP alone has cut is gathered in a group of its own.
    silent = [layer for layer, counted in found.items() if not sum(counted) + made[layer].elsewhere]
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
