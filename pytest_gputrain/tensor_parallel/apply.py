"""A plan carried out: `parallelize` for a model, `apply` for what a `TrainingCase` gives."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pytest_gputrain.tensor_parallel import heads, roles
from pytest_gputrain.tensor_parallel.plan import tp_plan_for
from pytest_gputrain.tensor_parallel.validate import resolve, sharded_heads, validate_plan

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
            f"case {case.name!r}: parallelize(model, mesh) returned {result!r:.60} "
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
) -> nn.Module:
    """Shard ``model`` in place over a 1-D mesh, and return it.

    plan: module name (torch's wildcards allowed) -> style; None is ``tp_plan_for(model, ...)``. Beside
    carrying it
    out: attention modules that see local queries are told their share of the heads, tied weights are tied
    again, what the plan leaves out becomes a replicated DTensor (so that clipping and foreach optimizers see
    one kind of parameter), and every gradient arrives in its parameter's own placement. Values are those of
    the mesh's first rank. Raises ValueError, one line, for what ``validate_plan`` refuses.
    """
    from torch.distributed.tensor.parallel import parallelize_module

    from pytest_gputrain.tensor_parallel import ties
    from pytest_gputrain.tensor_parallel.finish import enter_loss_parallel, replicate_rest, settle_gradients

    modules = dict(model.named_modules())
    chosen = (
        plan
        if plan is not None
        else tp_plan_for(model, sequence_parallel=sequence_parallel, loss_parallel=loss_parallel)
    )
    validate_plan(model, chosen, mesh.size())
    resolved = resolve(modules, chosen)
    tied = ties.find(model)
    shares = list(_shares(modules, resolved))
    for name, style in resolved.items():
        parallelize_module(modules[name], mesh, style)
    for share in shares:
        heads.divide(share.module, share.heads, mesh.size())
    replicate_rest(model, mesh, {norm for share in shares for norm in share.norms})
    ties.restore(model, tied)
    settle_gradients(model)
    if loss_parallel:
        enter_loss_parallel()
    return model


@dataclass(frozen=True)
class _Share:
    """An attention that gets a part of its heads, and its norms over one head's channels."""

    module: nn.Module
    heads: heads.Heads
    norms: tuple[nn.Module, ...]


def _shares(modules: Mapping[str, nn.Module], plan: Mapping[str, Any]) -> Iterator[_Share]:
    for block in roles.blocks(modules):
        found = sharded_heads(block, modules, plan) if block.kind == "attention" else None
        if found is not None:
            norms = heads.own_norms(block.owner, modules, (*block.columns, block.row), found.width) or []
            yield _Share(modules[block.owner], found, tuple(modules[name] for name in norms))
