"""A plan carried out: `parallelize` for a model, `apply` for what a `TrainingCase` gives."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from pytest_gputrain.tensor_parallel import heads, roles
from pytest_gputrain.tensor_parallel.plan import tp_plan_for
from pytest_gputrain.tensor_parallel.resolve import resolve
from pytest_gputrain.tensor_parallel.validate import sharded_heads, validate_plan

if TYPE_CHECKING:
    from torch import nn
    from torch.distributed.device_mesh import DeviceMesh

    from pytest_gputrain.case import TrainingCase

TP = "tp"


def apply(case: TrainingCase, model: nn.Module, mesh: DeviceMesh) -> nn.Module:
    """The case's model made tensor parallel on ``mesh``, whichever way the case says how.

    A function is called with (model, mesh), and may change the model in place and return None; a mapping is a
    plan for `parallelize`. Raises ValueError where the case says nothing, or something else is returned.
    """
    from torch import nn

    given = case.parallelize
    if given is None:
        raise ValueError(f"case {case.name!r} has no tensor-parallel plan; give it parallelize=")
    if isinstance(given, Mapping):
        return parallelize(model, mesh, given)
    result = given(model, mesh)
    if result is None:
        return model
    if not isinstance(result, nn.Module):
        raise ValueError(
            f"case {case.name!r}: parallelize(model, mesh) returned {' '.join(repr(result).split()):.60} "
            f"({type(result).__name__}); "
            "legal is the model, or None where it was changed in place"
        )
    return result


def parallelize(
    model: nn.Module,
    mesh: DeviceMesh,
    plan: Mapping[str, Any] | None = None,
    *,
    sequence_parallel: bool = False,
    loss_parallel: bool = False,
    data_parallel: Literal["average", "fsdp"] = "average",
) -> nn.Module:
    """Shard ``model`` in place, and return it.

    mesh: of one dimension, or of two, one of which is called "tp" and the other is data parallel. plan:
    module name (torch's wildcards allowed) -> style; None is ``tp_plan_for(model, ...)``. data_parallel: on
    a mesh of two dimensions, "average" makes gradients the mean over the other, "fsdp" shards what is left
    over it.

    Beside carrying the plan out: attention modules that see local queries are told their share of the heads,
    tied weights are tied again, what the plan leaves out becomes a replicated DTensor (so that clipping and
    foreach optimizers see one kind of parameter), and every gradient arrives in its parameter's own
    placement. Values are those of the mesh's first rank. Raises ValueError, one line, for what
    ``validate_plan`` refuses.
    """
    from pytest_gputrain.tensor_parallel.finish import enter_loss_parallel

    tensor_mesh, data_mesh = dimensions(mesh, data_parallel)
    modules = dict(model.named_modules())
    if plan is None:
        plan = tp_plan_for(model, sequence_parallel=sequence_parallel, loss_parallel=loss_parallel)
    validate_plan(model, plan, tensor_mesh.size())
    _shard(model, modules, resolve(modules, plan), tensor_mesh)
    if data_mesh is not None:
        _over_data(model, roles.layers(modules), data_mesh, data_parallel)
    if loss_parallel:
        enter_loss_parallel()
    return model


def dimensions(mesh: DeviceMesh, data_parallel: str = "average") -> tuple[DeviceMesh, DeviceMesh | None]:
    """The tensor-parallel dimension of a mesh, and the data-parallel one if there is one.

    Raises ValueError for a mesh whose dimensions cannot be told apart.
    """
    if data_parallel not in ("average", "fsdp"):
        raise ValueError(f"data_parallel is {data_parallel!r}; legal are 'average' and 'fsdp'")
    if mesh.ndim == 1:
        return mesh, None
    names = mesh.mesh_dim_names or ()
    if mesh.ndim != 2 or TP not in names:
        raise ValueError(
            f"the mesh has the dimensions {tuple(mesh.shape)} named {tuple(names) or 'nothing'}; legal are "
            f"one "
            f"dimension, or two of which one is called {TP!r}: init_device_mesh(..., mesh_dim_names=('dp', "
            f"'tp'))"
        )
    other = next(name for name in names if name != TP)
    return mesh[TP], mesh[other]


def _shard(model: nn.Module, modules: Any, plan: dict[str, Any], mesh: DeviceMesh) -> None:
    from torch.distributed.tensor.parallel import parallelize_module

    from pytest_gputrain.tensor_parallel import ties
    from pytest_gputrain.tensor_parallel.finish import own_outputs, replicate_rest, settle_gradients

    tied = ties.find(model)
    shares = list(_shares(modules, plan))
    for name, style in plan.items():
        parallelize_module(modules[name], mesh, style)
    own_outputs(modules[name] for name in plan)
    for share in shares:
        heads.divide(share.module, share.heads, mesh.size())
    _own_random_numbers(modules, plan, mesh)
    replicate_rest(model, mesh, {norm for share in shares for norm in share.norms})
    ties.restore(model, tied)
    settle_gradients(model)


def _own_random_numbers(modules: dict[str, nn.Module], plan: dict[str, Any], mesh: DeviceMesh) -> None:
    """Around everything that drops and is divided: from first to last layer, or in attention with divided
    heads.
    """
    from pytest_gputrain.tensor_parallel.dropout import Region, drops, surround
    from pytest_gputrain.tensor_parallel.sequence import SequenceLayer

    ends = [name for name, style in plan.items() if isinstance(style, SequenceLayer)]
    if ends:
        first, last = modules[ends[0]], modules[ends[-1]]
        if any(drops(modules[name]) for name in roles.layers(modules)):
            surround(first, last, Region(mesh, 0), within=False)
        return
    for number, block in enumerate(roles.blocks(modules)):
        divided = block.kind != "mlp" and sharded_heads(block, modules, plan) is not None
        if divided and drops(modules[block.owner]):
            columns, row = modules[block.columns[0]], modules[block.row]
            surround(columns, row, Region(mesh, number), within=True)


def _over_data(model: nn.Module, layers: list[str], mesh: DeviceMesh, how: str) -> None:
    from pytest_gputrain.tensor_parallel import data_parallel

    data_parallel.same_values(model, mesh)
    if how == "fsdp":
        data_parallel.shard_again(model, layers, mesh)
    else:
        data_parallel.average_gradients(model, mesh)


@dataclass(frozen=True)
class _Share:
    """An attention that gets a part of its heads, and its norms over one head's channels."""

    module: nn.Module
    heads: heads.Heads
    norms: tuple[nn.Module, ...]


def _shares(modules: Mapping[str, nn.Module], plan: Mapping[str, Any]) -> Iterator[_Share]:
    for block in roles.blocks(modules):
        found = sharded_heads(block, modules, plan) if block.kind != "mlp" else None
        if found is not None:
            norms = heads.own_norms(block.owner, modules, (*block.columns, block.row), found.width) or []
            yield _Share(modules[block.owner], found, tuple(modules[name] for name in norms))
