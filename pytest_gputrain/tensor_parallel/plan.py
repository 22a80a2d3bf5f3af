"""`tp_plan_for`: a tensor-parallel plan for a model, told from the names of its modules."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pytest_gputrain.tensor_parallel import heads, roles
from pytest_gputrain.tensor_parallel.plan_sequence import over_sequence

if TYPE_CHECKING:
    from torch import nn
    from torch.distributed.tensor.parallel import ParallelStyle

Plan = dict[str, "ParallelStyle"]


def tp_plan_for(model: nn.Module, *, sequence_parallel: bool = False, loss_parallel: bool = False) -> Plan:
    """Module name -> how it is sharded: attention by heads, MLPs by width, the vocabulary by rows.

    Modules that are not in the plan stay whole on every rank. The model may be on the meta device.
    sequence_parallel: between attention and MLP each rank has a part of the sequence, see `sequence`.
    loss_parallel: the head's logits stay divided over the vocabulary, a DTensor; the loss must be computed,
    and its backward run, under ``torch.distributed.tensor.parallel.loss_parallel()``, which ``parallelize``
    enters.

    Raises ValueError with one line where no module of the model is of a known family.
    """
    modules = dict(model.named_modules())
    plan: Plan = {}
    for block in roles.blocks(modules):
        plan.update(_attention(block, modules) if block.kind == "attention" else _mlp(block, modules))
    if not plan:
        raise ValueError(_unknown(model))
    plan.update(_vocabulary(modules, loss_parallel))
    return over_sequence(plan, modules) if sequence_parallel else plan


def _unknown(model: nn.Module) -> str:
    known = "; ".join(" ".join((*columns, rows[0])) for columns, rows in (*roles.ATTENTION, *roles.MLP))
    return (
        f"no module of {type(model).__name__} has the names of a known attention or MLP ({known}); "
        "give TrainingCase(parallelize=...) a plan, or a function (model, mesh)"
    )


def _attention(block: roles.Block, modules: dict[str, Any]) -> Plan:
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel

    from pytest_gputrain.tensor_parallel.styles import KeyValueParallel, Replicated

    query, key, value = block.columns
    if not _are_linear(modules, (*block.columns, block.row)):
        return {}
    found = heads.count(modules[block.owner], modules[query].out_features, modules[key].out_features)
    if found is None:
        raise ValueError(
            f"{block.owner} has queries of {modules[query].out_features} channels, and nothing tells its "
            f"number "
            f"of heads; give it one of the attributes {', '.join(heads.QUERY)}, or give a plan without it"
        )
    norms = heads.own_norms(block.owner, modules, (*block.columns, block.row), found.width)
    if norms is None:
        return {}
    return {
        **{name: Replicated(summed=True) for name in norms},
        query: ColwiseParallel(),
        key: KeyValueParallel(found.key_value),
        value: KeyValueParallel(found.key_value),
        block.row: RowwiseParallel(),
    }


def _mlp(block: roles.Block, modules: dict[str, Any]) -> Plan:
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel

    if not _are_linear(modules, (*block.columns, block.row)):
        return {}
    return {**{name: ColwiseParallel() for name in block.columns}, block.row: RowwiseParallel()}


def _are_linear(modules: dict[str, Any], names: tuple[str, ...]) -> bool:
    from torch import nn

    return all(isinstance(modules[name], nn.Linear) for name in names)


def _vocabulary(modules: dict[str, Any], loss_parallel: bool) -> Plan:
    from torch.distributed.tensor import Replicate, Shard
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel

    embedding, head = roles.vocabulary(modules)
    plan: Plan = {}
    if embedding is not None:
        plan[embedding] = RowwiseParallel(input_layouts=Replicate())
    if head is not None:
        plan[head] = (
            ColwiseParallel(output_layouts=Shard(-1), use_local_output=False)
            if loss_parallel
            else ColwiseParallel(output_layouts=Replicate())
        )
    elif loss_parallel:
        raise ValueError(
            "loss_parallel=True needs a head, a linear layer from the embedding's width to its rows"
        )
    return plan
