"""Which of the parallel model's parameters hold what of the reference's, on which rank."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from pytest_gputrain.tensor_parallel import golden_difference as apart
from pytest_gputrain.tensor_parallel.golden_coverage import weight_record
from pytest_gputrain.tensor_parallel.golden_layout import Layout, Segment, lay
from pytest_gputrain.tensor_parallel.golden_model import ComparisonError, aliases, parameters_of
from pytest_gputrain.tensor_parallel.golden_world import Pieces, World, is_dtensor
from pytest_gputrain.tensor_parallel.records import WeightRecord


@dataclass(frozen=True)
class Held:
    """One parameter of the parallel model on one rank. layout: of the whole tensor where it is a DTensor.

    off: how far the values are from the reference's, relative; 0.0 for equal bits, None if nothing fits.
    """

    layout: Layout | None
    local_shape: tuple[int, ...]
    whole_shape: tuple[int, ...]
    off: float | None
    sharded: bool = False
    is_dtensor: bool = False
    trainable: bool = True
    place: tuple[tuple[str, int], ...] = ()  # of a DTensor: where the rank is on the mesh's cut dimensions


# Of a parameter that other ranks have.
ABSENT = Held(Layout(0, False, ()), (0,), (0,), 0.0)


@dataclass
class Weights:
    """held: by parallel name, by rank, of all ranks. records: by the reference's parameters, in their order.

    tied: parameters that are one in the reference, by its first name; untied: those of them that are several
    in the parallel model, with their names there.
    """

    held: dict[str, list[Held]] = field(default_factory=dict)
    records: list[WeightRecord] = field(default_factory=list)
    tied: dict[str, list[str]] = field(default_factory=dict)
    untied: dict[str, list[str]] = field(default_factory=dict)

    def holders(self, source: str) -> list[str]:
        """The parallel parameters that hold something of the reference's parameter, on any rank."""
        return [
            name
            for name, by_rank in self.held.items()
            if any(s.source == source for held in by_rank if held.layout for s in held.layout.segments)
        ]

    def on_rank(self, source: str, rank: int) -> list[str]:
        """Those of the holders that have something of it on that rank."""
        return [name for name in self.holders(source) if self.held[name][rank] != ABSENT]

    def is_replicated(self, name: str) -> bool:
        """Whether every rank has the same part of the reference, the whole of it, in that parameter."""
        held = self.held[name]
        return not any(one.sharded or one.layout is None or one.layout != held[0].layout for one in held)

    @property
    def copies(self) -> int:
        """How many ranks hold the same parts as each other: data parallel replicas. 1 where all do."""
        size = len(next(iter(self.held.values())))
        kinds = {tuple((held[r].place, held[r].layout) for held in self.held.values()) for r in range(size)}
        return 1 if len(kinds) == 1 or size % len(kinds) else size // len(kinds)

    @property
    def problem(self) -> str | None:
        """The first parameter that is not the reference's."""
        wrong = [record for record in self.records if record.problem]
        if not wrong:
            return None
        more = f" (and {len(wrong) - 1} more of {len(self.records)} parameters)" if len(wrong) > 1 else ""
        return f"{wrong[0].problem}{more}"


def find_weights(reference: nn.Module, parallel: nn.Module, world: World) -> Weights:
    """All parameters right after parallelizing; collective. Raises ComparisonError if ranks disagree.

    A parameter that only some ranks have (whole experts) is held by those; the others hold nothing of it.
    """
    golden = {name: p.detach() for name, p in parameters_of(reference).items()}
    other_names = {alias: first for first, names in aliases(reference).items() for alias in names}
    parameters = parameters_of(parallel)
    names = _all_names(parameters, world)
    weights = Weights(tied=aliases(reference))
    left = dict(golden)
    pending = []
    for name in names:
        source = _by_name(name, golden, other_names)
        held = _held(parameters.get(name), {source: golden[source]} if source else {}, world)
        weights.held[name] = held
        if any(one.layout is None or one.off for one in held):
            pending.append(name)
        elif source:
            left.pop(source, None)
    for name in pending:
        # Renamed or fused: among all that nobody has claimed by name.
        found = _held(parameters.get(name), left, world)
        if all(one.layout is not None and not one.off for one in found):
            weights.held[name] = found
    for name, parameter in golden.items():
        weights.records.append(weight_record(name, parameter, weights, _trainable(reference, name)))
    weights.untied = {first: holders for first in weights.tied if len(holders := weights.holders(first)) > 1}
    return weights


def _trainable(model: nn.Module, name: str) -> bool:
    return bool(parameters_of(model)[name].requires_grad)


def _all_names(parameters: Mapping[str, Any], world: World) -> list[str]:
    """Those of all ranks, in the order of the first rank that has each; collective."""
    own = {name: is_dtensor(parameter) for name, parameter in parameters.items()}
    by_rank = world.merged(dict.fromkeys(world.held, own))
    names = list(dict.fromkeys(name for one in by_rank for name in one))
    common = [name for name in names if all(name in one for one in by_rank)]
    shared = set(common)
    for rank, other in enumerate(by_rank):
        here = [name for name in other if name in shared]
        if here != common:
            raise ComparisonError(
                f"after parallelize rank {rank} has its parameters in another order than rank 0: "
                f"{_first_other(common, here)}; all ranks have their modules in one order"
            )
        cut = next(
            (name for name in names if name not in other and any(one.get(name) for one in by_rank)), ""
        )
        if cut:
            raise ComparisonError(
                f"after parallelize {cut} is a DTensor and rank {rank} has no parameter of that name; all "
                "ranks of its mesh have a part of a DTensor, an empty one where need be"
            )
    return names


def _first_other(wanted: list[str], found: list[str]) -> str:
    return next(f"{two} in the place of {one}" for one, two in zip(wanted, found, strict=True) if one != two)


def _by_name(name: str, golden: Mapping[str, Any], other_names: Mapping[str, str]) -> str | None:
    """The reference's parameter of that name, or the one whose name ends alike (a wrapper put before it)."""
    if name in golden:
        return name
    if name in other_names:
        return other_names[name]
    alike = [one for one in golden if name.endswith(f".{one}") or one.endswith(f".{name}")]
    return alike[0] if len(alike) == 1 else None


def _held(parameter: Any, sources: Mapping[str, torch.Tensor], world: World) -> list[Held]:
    """By rank, of all ranks; collective. None for the parameter: this rank has none of that name."""
    if parameter is None:
        world.merged(dict.fromkeys(world.held, ()))
        return world.merged(dict.fromkeys(world.held, ABSENT))
    pieces, whole = world.pieces(parameter), world.whole(parameter)
    shapes = world.merged({rank: tuple(one.shape) for rank, one in whole.items()})
    own = {}
    for rank in world.held:
        layout, off = _match(whole, rank, sources, shapes)
        own[rank] = Held(
            layout,
            tuple(pieces[rank].shape),
            tuple(whole[rank].shape),
            off,
            sharded=_is_sharded(parameter),
            is_dtensor=is_dtensor(parameter),
            trainable=bool(parameter.requires_grad),
            place=_place(parameter, rank),
        )
    return world.merged(own)


def _place(parameter: Any, rank: int) -> tuple[tuple[str, int], ...]:
    if not is_dtensor(parameter):
        return ()
    mesh = parameter.device_mesh
    names = mesh.mesh_dim_names or tuple(map(str, range(mesh.ndim)))
    at = (mesh.mesh == rank).nonzero()
    where = at[0].tolist() if len(at) else [0] * mesh.ndim
    cut = [index for index, placement in enumerate(parameter.placements) if placement.is_shard()]
    return tuple((names[index], where[index]) for index in cut)


def _is_sharded(parameter: Any) -> bool:
    return is_dtensor(parameter) and any(placement.is_shard() for placement in parameter.placements)


def _match(
    whole: Pieces, rank: int, sources: Mapping[str, torch.Tensor], shapes: list[tuple[int, ...]]
) -> tuple[Layout | None, float | None]:
    """The layout, and how far its values are off."""
    own = whole[rank]
    for name, source in sources.items():
        if source.shape == own.shape and source.dtype == own.dtype and torch.equal(source, own):
            return _all_of(name, own), 0.0
    layout = lay(own, sources)
    if layout is not None:
        return layout, 0.0
    if len(sources) == 1:
        name, source = next(iter(sources.items()))
        return _by_shape(name, source, own, rank, shapes)
    return None, None


def _all_of(name: str, own: torch.Tensor) -> Layout:
    length = own.shape[0] if own.dim() else 1
    return Layout(0, False, (Segment(0, length, name, 0),))


def _by_shape(
    name: str, source: torch.Tensor, own: torch.Tensor, rank: int, shapes: list[tuple[int, ...]]
) -> tuple[Layout | None, float | None]:
    """Other values than the reference's: the part that a rank of that shape would have."""
    if source.shape == own.shape:
        return _all_of(name, own), apart.difference(source.to(own.dtype), own).relative
    if source.dim() != own.dim():
        return None, None
    cut = [d for d in range(own.dim()) if source.shape[d] != own.shape[d]]
    if len(cut) != 1:
        return None, None
    dim = cut[0]
    start = sum(shape[dim] for shape in shapes[:rank]) % source.shape[dim]
    length = min(own.shape[dim], source.shape[dim] - start)
    layout = Layout(dim, False, (Segment(0, length, name, start),))
    wanted = source.narrow(dim, start, length).to(own.dtype)
    return layout, apart.difference(wanted, own.narrow(dim, 0, length)).relative
