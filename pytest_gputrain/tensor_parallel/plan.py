"""`tp_plan_for`: a tensor-parallel plan for a model, told from the names of its modules."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from pytest_gputrain.tensor_parallel import heads, roles
from pytest_gputrain.tensor_parallel.plan_sequence import over_sequence

if TYPE_CHECKING:
    from torch import nn
    from torch.distributed.tensor.parallel import ParallelStyle

Plan = dict[str, "ParallelStyle"]

# Linear modules of fewer outputs (a router's experts) are not worth a gather, nor divisible by many ranks.
LEAST_OUTPUTS = 16


def tp_plan_for(model: nn.Module, *, sequence_parallel: bool = False, loss_parallel: bool = False) -> Plan:
    """Module name -> how it is sharded: attention by heads, MLPs by width, the vocabulary by rows.

    Attention and MLP are known by their names (``roles``); other linear modules of numbered layers are cut by
    outputs and gathered.

    Modules that are not in the plan stay whole on every rank. The model may be on the meta device.
    sequence_parallel: between attention and MLP each rank has a part of the sequence, see `sequence`.
    loss_parallel: the head's logits stay divided over the vocabulary, a DTensor; the loss must be computed,
    and its backward run, under ``torch.distributed.tensor.parallel.loss_parallel()``, which ``parallelize``
    enters.

    Raises ValueError with one line for a model in which there is nothing to shard.
    """
    modules = dict(model.named_modules())
    plan: Plan = {}
    for block in roles.blocks(modules):
        plan.update(_BY_KIND[block.kind](block, modules))
    if not sequence_parallel:
        # A part of a sequence cannot be known to be enough for a module of an unknown kind.
        plan.update(_other_linears(model, modules, plan))
    if not plan and not sequence_parallel:
        raise ValueError(_unknown(model))
    plan.update(_vocabulary(model, modules, loss_parallel))
    return over_sequence(plan, modules) if sequence_parallel else plan


def _unknown(model: nn.Module) -> str:
    known = "; ".join(" ".join((*columns, rows[0])) for columns, rows in (*roles.ATTENTION, *roles.MLP))
    return (
        f"{type(model).__name__} has no numbered layers with linear modules, nor an attention or MLP with "
        f"the names "
        f"of a known family ({known}); give TrainingCase(parallelize=...) a plan, or a function (model, mesh)"
    )


def _attention(block: roles.Block, modules: dict[str, Any]) -> Plan:
    """Columns and row by heads; nothing where heads cannot be told, or something else depends on them."""
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel

    from pytest_gputrain.tensor_parallel.styles import KeyValueParallel, Replicated

    query, key, value = block.columns
    if not _are_linear(modules, (*block.columns, block.row)):
        return {}
    found = heads.count(modules[block.owner], modules[query].out_features, modules[key].out_features)
    if found is None or heads.by_head(block.owner, modules, found):
        return {}
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


def _fused(block: roles.Block, modules: dict[str, Any]) -> Plan:
    """The attention of GPT-2, which cuts its three projections apart at an attribute of its own."""
    from pytest_gputrain.tensor_parallel.conv1d import Conv1DColwise, Conv1DRowwise

    (column,) = block.columns
    if not all(roles.is_conv1d(modules[name]) for name in (column, block.row)):
        return {}
    width = roles.widths(modules[column])[1]
    owner = modules[block.owner]
    if getattr(owner, "split_size", None) != width // 3 or heads.count(owner, width // 3, width // 3) is None:
        return {}
    return {column: Conv1DColwise(parts=3), block.row: Conv1DRowwise()}


def _mlp(block: roles.Block, modules: dict[str, Any]) -> Plan:
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel

    from pytest_gputrain.tensor_parallel.conv1d import Conv1DColwise, Conv1DRowwise

    names = (*block.columns, block.row)
    if all(roles.is_conv1d(modules[name]) for name in names):
        return {**{name: Conv1DColwise() for name in block.columns}, block.row: Conv1DRowwise()}
    if not _are_linear(modules, names):
        return {}
    return {**{name: ColwiseParallel() for name in block.columns}, block.row: RowwiseParallel()}


_BY_KIND: dict[str, Callable[[roles.Block, dict[str, Any]], Plan]] = {
    "attention": _attention,
    "fused": _fused,
    "mlp": _mlp,
}


def _other_linears(model: nn.Module, modules: dict[str, Any], plan: Plan) -> Plan:
    """Every other linear module of the numbered layers: cut by outputs, which are gathered at once.

    Right whatever the output is for (fused projections, heads that cannot be told), but only its memory and
    its product are divided.
    """
    from torch import nn
    from torch.distributed.tensor import Replicate
    from torch.distributed.tensor.parallel import ColwiseParallel

    from pytest_gputrain.tensor_parallel import ties

    tied = {module for tie in ties.find(model) for module, _ in tie.places}
    return {
        name: ColwiseParallel(output_layouts=Replicate())
        for name, module in modules.items()
        # The class itself: a subclass may be there to have its weight read (nn.MultiheadAttention's).
        if type(module) is nn.Linear
        and any(part.isdecimal() for part in name.split("."))
        and name not in plan
        and name not in tied
        and module.out_features >= LEAST_OUTPUTS
    }


def _are_linear(modules: dict[str, Any], names: tuple[str, ...]) -> bool:
    from torch import nn

    return all(isinstance(modules[name], nn.Linear) for name in names)


def _vocabulary(model: nn.Module, modules: dict[str, Any], loss_parallel: bool) -> Plan:
    """The token embedding by rows and the head by columns, and whatever is tied to them.

    Nothing where a module that cannot be cut along has a parameter of theirs too, as BERT's bias of the head.
    """
    from torch import nn
    from torch.distributed.tensor import Replicate, Shard
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel

    from pytest_gputrain.tensor_parallel import ties

    embedding, head = roles.vocabulary(modules)
    if head is None and loss_parallel:
        raise ValueError(
            "loss_parallel=True needs a head, a linear layer from the embedding's width to its rows"
        )
    if embedding is None:
        return {}
    weight = modules[embedding].weight
    plan: Plan = {}
    for name, module in modules.items():
        if isinstance(module, nn.Embedding) and (name == embedding or module.weight is weight):
            plan[name] = RowwiseParallel(input_layouts=Replicate())
        elif isinstance(module, nn.Linear) and (name == head or module.weight is weight):
            plan[name] = (
                ColwiseParallel(output_layouts=Shard(-1), use_local_output=False)
                if loss_parallel
                else ColwiseParallel(output_layouts=Replicate())
            )
    for tie in ties.find(model):
        if len({module in plan for module, _ in tie.places}) == 2:
            if loss_parallel:
                names = " and ".join(tie.names())
                raise ValueError(f"loss_parallel=True needs a head of its own; {names} are one parameter")
            return {}
    return plan
