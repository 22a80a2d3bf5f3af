"""How much of the model each rank holds: by parameter, by layer, in all, and in bytes really alive."""

from __future__ import annotations

import gc
import re
from collections.abc import Iterable, Sequence
from typing import Any

import torch

from pytest_gputrain.case import TrainingCase
from pytest_gputrain.tensor_parallel.golden_model import SEED, parameters_of
from pytest_gputrain.tensor_parallel.golden_pair import Pair
from pytest_gputrain.tensor_parallel.records import WeightRecord
from pytest_gputrain.tensor_parallel.records_memory import Accounting, Share

MOST_OVERHEAD = 0.5
MOST_IMBALANCE = 0.25  # of the sharded part: an uneven vocabulary is a few rows
_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")
ALIVE_SLACK = 1 << 16  # bytes: masks, positions and other small things that a model makes


def account(case: TrainingCase, mesh: Any, *, seed: int = SEED) -> Accounting:
    """Run on every rank of ``mesh``; returns the same record on all."""
    pair = Pair(case, mesh, seed=seed)
    before = _alive(pair.device)
    pair.parallelize()
    after = _alive(pair.device)
    return accounting_of(pair, () if pair.world.simulated else _merged(pair, after - before))


def _merged(pair: Pair, grown: int) -> tuple[int, ...]:
    return tuple(pair.world.merged(dict.fromkeys(pair.world.held, grown)))


def accounting_of(pair: Pair, measured: tuple[int, ...] = ()) -> Accounting:
    """The accounts of a pair that was parallelized; collective."""
    records = pair.weights.records
    parameters = [_share(pair, record) for record in records]
    whole = _sum("the model", parameters, pair)
    cut = _sum("sharded parameters", [one for one in parameters if one.kind != "replicated"], pair)
    sizes = {name: parameter.element_size() for name, parameter in parameters_of(pair.reference).items()}
    held = _parameter_bytes(pair)
    needed = [
        sum(share.local[rank] * sizes[share.name] for share in parameters) for rank in range(pair.world.size)
    ]
    total_bytes = sum(share.total * sizes[share.name] for share in parameters)
    problem = (
        pair.problem
        or pair.weights.problem
        or _judge(whole, cut, parameters)
        or _unlike_siblings(records)
        or _judge_bytes(held, needed, measured, total_bytes)
    )
    return Accounting(
        world_size=pair.world.size,
        whole=whole,
        sharded=cut,
        layers=tuple(_by_layer(parameters, pair)),
        parameters=tuple(parameters),
        total_bytes=total_bytes,
        parameter_bytes=held,
        measured_bytes=measured,
        simulated=pair.world.simulated,
        problem=problem,
        notes=tuple(pair.notes),
    )


def _share(pair: Pair, record: WeightRecord) -> Share:
    """Elements by rank. Where a parallel parameter is made of several, each counts its own part of it."""
    total = torch.Size(record.shape).numel()
    local = []
    for rank in range(pair.world.size):
        count = 0
        for holder in record.held_as:
            held = pair.weights.held[holder][rank]
            have = torch.Size(held.local_shape).numel()
            if held.layout is None or held.is_dtensor or not held.whole_shape:
                count += have
                continue
            mine = sum(s.length for s in held.layout.segments if s.source == record.name)
            count += have * mine // max(1, held.layout.matched)
        local.append(count)
    return Share(record.name, total, tuple(local), record.kind, pair.weights.copies)


def _sum(name: str, shares: Sequence[Share], pair: Pair) -> Share:
    local = tuple(sum(share.local[rank] for share in shares) for rank in range(pair.world.size))
    return Share(name, sum(share.total for share in shares), local, copies=pair.weights.copies)


def layer_of(name: str) -> str:
    """``model.layers.3`` of model.layers.3.mlp.fc1.weight; the module where there is no number."""
    parts = name.split(".")
    for index, part in enumerate(parts[:-1]):
        if part.isdigit():
            return ".".join(parts[: index + 1])
    return ".".join(parts[:-1]) or name


def _by_layer(shares: Iterable[Share], pair: Pair) -> list[Share]:
    layers: dict[str, list[Share]] = {}
    for share in shares:
        layers.setdefault(layer_of(share.name), []).append(share)
    return [_sum(layer, members, pair) for layer, members in layers.items()]


def _parameter_bytes(pair: Pair) -> tuple[int, ...]:
    """By rank, of the storages behind the parameters, each once."""
    storages: dict[int, dict[int, int]] = {rank: {} for rank in pair.world.held}
    for parameter in parameters_of(pair.parallel).values():
        for rank, piece in pair.world.pieces(parameter).items():
            storage = piece.untyped_storage()
            storages[rank][storage.data_ptr()] = storage.nbytes()
    return tuple(pair.world.merged({rank: sum(sizes.values()) for rank, sizes in storages.items()}))


def _alive(device: torch.device) -> int:
    """Bytes of all tensors that Python can reach, or that the device has allocated."""
    gc.collect()
    if device.type == "cuda":
        return int(torch.cuda.memory_allocated(device))
    seen = {}
    for thing in gc.get_objects():
        if type(thing) in (torch.Tensor, torch.nn.Parameter):
            try:
                storage = thing.untyped_storage()
                seen[storage.data_ptr()] = storage.nbytes()
            except (RuntimeError, NotImplementedError):  # a tensor without memory
                continue
    return sum(seen.values())


def _judge(whole: Share, cut: Share, parameters: Sequence[Share]) -> str | None:
    size = len(whole.local)
    if not cut.total:
        return (
            f"nothing is sharded: each of the {size} ranks holds all {whole.total:,} elements of all "
            f"{len(parameters)} parameters"
        )
    if whole.overhead >= MOST_OVERHEAD:
        replicated = [one for one in parameters if one.kind == "replicated"]
        largest = max(replicated, key=lambda one: one.total, default=None)
        why = f"; the largest on every rank: {largest.name}, {largest.total:,}" if largest else ""
        return (
            f"{size} ranks hold {sum(whole.local):,} elements of {whole.total:,}: overhead "
            f"{100 * whole.overhead:.0f} %, legal is less than {100 * MOST_OVERHEAD:.0f} %{why}"
        )
    if cut.imbalance > MOST_IMBALANCE:
        most, least = cut.local.index(max(cut.local)), cut.local.index(min(cut.local))
        return (
            f"ranks are not balanced: of the {cut.total:,} sharded elements rank {most} holds "
            f"{max(cut.local):,} and rank {least} {min(cut.local):,}"
        )
    return None


def _unlike_siblings(records: Sequence[WeightRecord]) -> str | None:
    """A matrix that is whole on every rank in one layer, and cut in most that have one of its shape."""
    alike: dict[tuple[str, tuple[int, ...]], list[WeightRecord]] = {}
    for record in records:
        if len(record.shape) > 1 and (stem := _NUMBER.sub("#", record.name)) != record.name:
            alike.setdefault((stem, record.shape), []).append(record)
    for siblings in alike.values():
        whole = [one for one in siblings if one.kind == "replicated"]
        cut = len(siblings) - len(whole)
        if whole and cut > max(1, len(siblings) // 2):
            more = f", and {len(whole) - 1} more like it," if len(whole) > 1 else ""
            return (
                f"{whole[0].name}{more} is whole on every rank, and cut in the {cut} other layers that have "
                "one: does the plan leave it out?"
            )
    return None


def _judge_bytes(
    held: Sequence[int], needed: Sequence[int], measured: Sequence[int], total: int
) -> str | None:
    for rank, (have, need) in enumerate(zip(held, needed, strict=True)):
        if have > 1.25 * need and have - need > ALIVE_SLACK // 16:
            return (
                f"rank {rank}'s parameters are {need:,} bytes but keep {have:,} alive: they are views of "
                "whole weights; clone the part that a rank keeps"
            )
    for rank, (alive, need) in enumerate(zip(measured, needed, strict=False)):
        if alive - need > max(ALIVE_SLACK, (total - need) // 2):
            return (
                f"rank {rank} holds {need:,} bytes of parameters, but making the model parallel left "
                f"{alive:,} alive, of {total:,} that the whole model has: whole weights are kept somewhere"
            )
    return None
