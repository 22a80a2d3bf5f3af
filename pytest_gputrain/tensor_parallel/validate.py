"""What is wrong with a plan, told in one line before any rank starts.

Works on shapes only: give it a model on the meta device and it costs neither memory nor time.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from pytest_gputrain.tensor_parallel import heads, roles
from pytest_gputrain.tensor_parallel.resolve import resolve

if TYPE_CHECKING:
    from torch import nn


def validate_mesh(shape: Sequence[int], world_size: int) -> None:
    """Raises ValueError where a mesh of this shape needs another number of ranks than there are."""
    needed = math.prod(shape)
    if needed != world_size or min(shape, default=0) < 1:
        written = " x ".join(str(size) for size in shape)
        arithmetic = f"{written} = {needed}" if len(shape) > 1 else written
        raise ValueError(
            f"a mesh of {arithmetic} needs {needed} ranks, and there are {world_size}; "
            f"give a shape whose product is {world_size}"
        )


def validate_plan(model: nn.Module, plan: Mapping[str, Any], world_size: int) -> None:
    """Raises ValueError, one line, for the first entry of the plan that cannot be carried out on so many
    ranks.

    world_size: ranks of the tensor-parallel dimension. Styles may have transformers' names ("colwise"). Keys
    may have torch's wildcards (``layers.*.fc1``).
    """
    modules = dict(model.named_modules())
    resolved = resolve(modules, plan)
    for name, style in resolved.items():
        _style_fits(name, modules[name], style)
    for block in roles.blocks(modules):
        if block.kind != "mlp":
            _heads_divide(block, modules, resolved, world_size)
    for name, style in resolved.items():
        _width_divides(name, modules[name], style, world_size)
    _ties_agree(model, resolved)


def _style_fits(name: str, module: Any, style: Any) -> None:
    from torch import nn
    from torch.distributed.tensor.parallel import ColwiseParallel, ParallelStyle, RowwiseParallel

    from pytest_gputrain.tensor_parallel.conv1d import Conv1DColwise, Conv1DRowwise

    if not isinstance(style, ParallelStyle):
        raise ValueError(
            f"the plan gives {name!r} {style!r} ({type(style).__name__}); legal is a ParallelStyle of "
            f"torch, as "
            "ColwiseParallel()"
        )
    if isinstance(style, ColwiseParallel | RowwiseParallel):
        fits, legal = isinstance(module, nn.Linear | nn.Embedding), "Linear and Embedding"
    elif isinstance(style, Conv1DColwise | Conv1DRowwise):
        fits, legal = roles.is_conv1d(module), "Conv1D of transformers"
    else:
        return
    if not fits:
        raise ValueError(
            f"the plan gives {name!r}, a {type(module).__name__}, the style {type(style).__name__}; that "
            f"style "
            f"fits {legal}"
        )


def _heads_divide(
    block: roles.Block, modules: Mapping[str, Any], plan: Mapping[str, Any], world_size: int
) -> None:
    found = sharded_heads(block, modules, plan)
    if found is None:
        return
    if world_size > 1 and (listed := heads.by_head(block.owner, modules, found)):
        raise ValueError(
            f"{listed} has an entry for each of the {found.query} heads of {block.owner}, and the plan cuts "
            f"those over {world_size} ranks; gather its projections, "
            "ColwiseParallel(output_layouts=Replicate()), as tp_plan_for(model) does"
        )
    if found.query % world_size:
        raise ValueError(
            f"{block.owner} has {found.query} heads, not divisible by "
            f"{_arithmetic(found.query, world_size)}; {_legal(found.query)}"
        )
    replicates = hasattr(plan.get(block.columns[-1]), "is_divided")
    if found.key_value % world_size == 0 or (replicates and world_size % found.key_value == 0):
        return
    raise ValueError(
        f"{block.owner} has {found.key_value} key-value heads, not divisible by "
        f"{_arithmetic(found.key_value, world_size)}"
        + (
            f", and {world_size} ranks are no multiple of {found.key_value} heads; {_legal(found.key_value)}"
            if replicates
            else f"; {_legal(found.key_value)}, or replicate them: tp_plan_for(model) does"
        )
    )


def sharded_heads(
    block: roles.Block, modules: Mapping[str, Any], plan: Mapping[str, Any]
) -> heads.Heads | None:
    """The heads of an attention whose module sees local queries under this plan, and so has to be divided."""
    from torch.distributed.tensor.parallel import ColwiseParallel

    from pytest_gputrain.tensor_parallel.conv1d import Conv1DColwise

    style = plan.get(block.columns[0])
    if isinstance(style, Conv1DColwise):
        width = roles.widths(modules[block.columns[0]])[1] // style.parts
        return heads.count(modules[block.owner], width, width)
    # Queries that stay a DTensor, or are gathered, have the whole number of heads.
    if not isinstance(style, ColwiseParallel) or not style.use_local_output or block.kind == "fused":
        return None
    if not style.output_layouts[0].is_shard():
        return None
    query, key, _ = (modules[name].out_features for name in block.columns)
    return heads.count(modules[block.owner], query, key)


def _width_divides(name: str, module: Any, style: Any, world_size: int) -> None:
    from torch import nn
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel

    from pytest_gputrain.tensor_parallel.conv1d import Conv1DColwise, Conv1DRowwise

    if isinstance(module, nn.Embedding):
        if isinstance(style, RowwiseParallel):
            _no_empty_shard(name, "rows", module.num_embeddings, world_size)
        elif isinstance(style, ColwiseParallel):
            _divides(name, "embedding channels", module.embedding_dim, world_size)
    elif isinstance(style, Conv1DColwise):
        _divides(name, "output features", roles.widths(module)[1] // style.parts, world_size)
    elif isinstance(style, Conv1DRowwise):
        _divides(name, "input features", roles.widths(module)[0], world_size)
    elif hasattr(style, "is_divided"):
        return
    elif isinstance(style, RowwiseParallel):
        _divides(name, "input features", module.in_features, world_size)
    elif isinstance(style, ColwiseParallel):
        # Gathered or kept as a DTensor, an output may have shards of different sizes: a vocabulary of 50257.
        if style.use_local_output and style.output_layouts[0].is_shard():
            _divides(name, "output features", module.out_features, world_size)
        else:
            _no_empty_shard(name, "output features", module.out_features, world_size)


def _divides(name: str, what: str, size: int, world_size: int) -> None:
    if size % world_size:
        raise ValueError(
            f"{name} has {size} {what}, not divisible by {_arithmetic(size, world_size)}; {_legal(size)}"
        )


def _no_empty_shard(name: str, what: str, size: int, world_size: int) -> None:
    shard = -(-size // world_size)
    if shard * (world_size - 1) >= size:
        raise ValueError(
            f"{name} has {size} {what}: shards of {shard} leave nothing for the last of {world_size} ranks "
            f"({world_size - 1} x {shard} = {shard * (world_size - 1)}); give fewer ranks"
        )


def _arithmetic(size: int, world_size: int) -> str:
    return f"{world_size} ranks ({size} = {size // world_size} x {world_size} + {size % world_size})"


def _legal(size: int) -> str:
    divisors = [str(number) for number in range(1, min(size, 64) + 1) if size % number == 0]
    return f"legal numbers of ranks: {', '.join(divisors)}"


def _ties_agree(model: nn.Module, plan: Mapping[str, Any]) -> None:
    from pytest_gputrain.tensor_parallel import ties

    for tie in ties.find(model):
        found = {
            name: _sharded_dimension(model.get_submodule(name), plan.get(name)) for name, _ in tie.places
        }
        if len(set(found.values())) > 1:
            told = "; ".join(
                f"{name}: {'whole' if dimension is None else f'dimension {dimension}'}"
                for name, dimension in found.items()
            )
            raise ValueError(
                f"{' and '.join(tie.names())} are one tied parameter, and the plan shards it differently "
                f"({told}); give them the same dimension, as RowwiseParallel on the embedding and "
                "ColwiseParallel on the head"
            )


def _sharded_dimension(module: Any, style: Any) -> int | None:
    """The dimension on which the style shards the module's weight; None where it stays whole."""
    from torch import nn
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel

    if isinstance(style, ColwiseParallel):
        return 1 if isinstance(module, nn.Embedding) else 0
    if isinstance(style, RowwiseParallel):
        return 0 if isinstance(module, nn.Embedding) else 1
    return None
