"""Tensor parallelism of the tiny model by torch's own ``parallelize_module``, and what it leaves to do."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tests.planted.tp_model import LM

Plan = dict[str, Any]


def plan_for(model: LM, gather_logits: bool) -> Plan:
    from torch.distributed.tensor import Replicate, Shard
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel

    head = (
        ColwiseParallel(output_layouts=Replicate())
        if gather_logits
        else ColwiseParallel(output_layouts=Shard(-1), use_local_output=False)
    )
    plan: Plan = {"embed": RowwiseParallel(input_layouts=Replicate()), "head": head}
    for number in range(len(model.blocks)):
        block = f"blocks.{number}"
        plan |= {f"{block}.attention.{name}": ColwiseParallel() for name in ("query", "key", "value")}
        plan |= {f"{block}.attention.out": RowwiseParallel()}
        plan |= {f"{block}.mlp.up": ColwiseParallel(), f"{block}.mlp.down": RowwiseParallel()}
    return plan


def sequence_plan_for(model: LM, gather_logits: bool) -> Plan:
    """Between attention and MLP each rank holds a part of the sequence."""
    from torch.distributed.tensor import Replicate, Shard
    from torch.distributed.tensor.parallel import (
        ColwiseParallel,
        PrepareModuleInput,
        RowwiseParallel,
        SequenceParallel,
    )

    def into(before: Any, wanted: Any, local: bool = False) -> Any:
        return PrepareModuleInput(
            input_layouts=(before,), desired_input_layouts=(wanted,), use_local_output=local
        )

    plan = plan_for(model, gather_logits)
    plan["norm"] = SequenceParallel()
    plan["head"] = ColwiseParallel(input_layouts=Shard(1), output_layouts=Replicate())
    for number in range(len(model.blocks)):
        block = f"blocks.{number}"
        plan |= {f"{block}.norm1": SequenceParallel(), f"{block}.norm2": SequenceParallel()}
        plan |= {f"{block}.{part}": into(Shard(1), Replicate()) for part in ("attention", "mlp")}
        plan[f"{block}.attention.out"] = RowwiseParallel(output_layouts=Shard(1))
        plan[f"{block}.mlp.down"] = RowwiseParallel(output_layouts=Shard(1))
    plan["blocks.0"] = into(Replicate(), Shard(1), local=True)
    return plan


def by_plan(
    plan_of: Callable[[LM, bool], Plan],
    *,
    gather_logits: bool = True,
    divide_heads: bool = True,
    tie: bool = True,
) -> Callable[[LM, Any], LM]:
    """``parallelize(model, mesh)`` by that plan."""

    def parallelize(model: LM, mesh: Any) -> LM:
        from torch.distributed.tensor.parallel import parallelize_module

        tied = model.head.weight is model.embed.weight
        parallelize_module(model, mesh, plan_of(model, gather_logits))
        if tied and tie:
            model.head.weight = model.embed.weight
        for block in model.blocks:
            if divide_heads:
                block.attention.heads //= mesh.size()
                block.attention.kv_heads //= mesh.size()
        return model

    return parallelize


def with_sharded_loss(parallelize: Callable[[LM, Any], LM]) -> Callable[[LM, Any], LM]:
    """Cross entropy of logits that stay cut over the vocabulary, for the rest of this process."""

    def parallel(model: LM, mesh: Any) -> LM:
        from torch.distributed.tensor.parallel import loss_parallel

        loss_parallel().__enter__()  # backward needs it as well
        return parallelize(model, mesh)

    return parallel
