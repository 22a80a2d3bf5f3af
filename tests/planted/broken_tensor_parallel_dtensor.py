"""Tensor parallelism by torch's ``parallelize_module`` with one defect each."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pytest_gputrain.case import TrainingCase
from tests.planted.tp_dtensor import Plan, by_plan, plan_for, sequence_plan_for
from tests.planted.tp_loops import MAX_NORM, clipped, unwrapped
from tests.planted.tp_model import LM, MLP, broken_tp, loss, tp_case


@broken_tp("tp_backward", "no longer tied")
def dtensor_tied_weights_untied() -> TrainingCase:
    """What parallelize_module does when nobody ties them again."""
    return tp_case("dtensor_tied_weights_untied", by_plan(plan_for, tie=False), tied=True)


@broken_tp("tp_forward", "are off by")
def dtensor_heads_not_divided() -> TrainingCase:
    return tp_case("dtensor_heads_not_divided", by_plan(plan_for, divide_heads=False))


def replicate(model: LM, mesh: Any) -> LM:
    """Distributed tensors throughout, and each of them whole on every rank."""
    from torch.distributed.tensor import DTensor, distribute_module

    def enter(module: nn.Module, inputs: Any, mesh: Any) -> Any:
        return DTensor.from_local(inputs[0], mesh)

    def leave(module: nn.Module, output: Any, mesh: Any) -> Any:
        return output.to_local()

    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Embedding):
            distribute_module(module, mesh, input_fn=enter, output_fn=leave)
    return model


@broken_tp("tp_memory", "nothing is sharded")
def dtensor_everything_replicated() -> TrainingCase:
    return tp_case("dtensor_everything_replicated", replicate)


def plan_that_forgets_the_norms(model: LM, gather_logits: bool) -> Plan:
    plan = sequence_plan_for(model, gather_logits)
    return {name: style for name, style in plan.items() if "norm" not in name}


@broken_tp("tp_backward", "norm (gradient is not summed over the 2 ranks)")
def dtensor_sequence_parallel_plan_without_norms() -> TrainingCase:
    return tp_case("dtensor_sequence_parallel_plan_without_norms", by_plan(plan_that_forgets_the_norms))


def put_back_whole(model: LM, mesh: Any) -> LM:
    """A loader that puts one block's whole weights back, and drops the hooks that stand in its way."""
    whole = {name: weight.detach().clone() for name, weight in model.blocks[1].named_parameters()}
    heads, kv_heads = model.blocks[1].attention.heads, model.blocks[1].attention.kv_heads
    model = by_plan(plan_for)(model, mesh)
    block = model.blocks[1]
    block.attention.heads, block.attention.kv_heads = heads, kv_heads
    for name, module in block.named_modules():
        if isinstance(module, nn.Linear):
            module.weight, module.bias = (nn.Parameter(whole[f"{name}.{of}"]) for of in ("weight", "bias"))
            module._forward_pre_hooks.clear()
            module._forward_hooks.clear()
    return model


@broken_tp("tp_backward", "blocks.1 makes no collective forward, where the plan says 2 all_reduce")
def dtensor_block_put_back_whole() -> TrainingCase:
    return tp_case("dtensor_block_put_back_whole", put_back_whole)


def plan_that_leaves_sums_partial(model: LM, gather_logits: bool) -> Plan:
    from torch.distributed.tensor import Partial
    from torch.distributed.tensor.parallel import RowwiseParallel

    return plan_for(model, gather_logits) | {"blocks.1.mlp.down": RowwiseParallel(output_layouts=Partial())}


@broken_tp("tp_forward", "are off by")
def dtensor_output_left_partial() -> TrainingCase:
    return tp_case("dtensor_output_left_partial", by_plan(plan_that_leaves_sums_partial))


class LocalMLP(nn.Module):
    """Computes on local parts to go around an operator that DTensor does not know."""

    def __init__(self, inner: MLP) -> None:
        super().__init__()
        self.up: Any = inner.up
        self.down: Any = inner.down

    def forward(self, x: Tensor) -> Tensor:
        hidden = F.linear(x, self.up.weight.to_local(), self.up.bias.to_local())
        out: Tensor = self.down(F.gelu(hidden))
        return out


def around_dtensor(model: LM, mesh: Any) -> LM:
    model = by_plan(plan_for)(model, mesh)
    model.blocks[1].mlp = LocalMLP(model.blocks[1].mlp)
    return model


@broken_tp("tp_backward", "blocks.1.norm2 (gradient is not summed")
def dtensor_weights_used_as_local_ones() -> TrainingCase:
    return tp_case("dtensor_weights_used_as_local_ones", around_dtensor)


def local_loss(model: Any, batch: Any) -> Tensor:
    """Targets that lie in other ranks' parts are left out, as if they were padding."""
    logits = model(batch["x"])
    if logits.size(-1) == unwrapped(model).shape.vocab:
        return loss(lambda _: logits, batch)
    start = torch.distributed.get_rank() * logits.size(-1)
    targets = batch["y"] - start
    elsewhere = (targets < 0) | (targets >= logits.size(-1))
    return F.cross_entropy(logits.flatten(0, 1), targets.masked_fill(elsewhere, -100).flatten())


def plan_with_local_logits(model: LM, gather_logits: bool) -> Plan:
    from torch.distributed.tensor.parallel import ColwiseParallel

    return plan_for(model, gather_logits) | {"head": ColwiseParallel()}


@broken_tp("tp_backward", "the loss for an input of", may_fail=("ddp_completes", "ddp_parity"))
def dtensor_cross_entropy_on_the_local_vocabulary() -> TrainingCase:
    return tp_case(
        "dtensor_cross_entropy_on_the_local_vocabulary",
        by_plan(plan_with_local_logits),
        fields={"loss": local_loss},
    )


def clip_local_parts(parameters: list[Any]) -> None:
    gradients = [getattr(p.grad, "_local_tensor", p.grad) for p in parameters]
    norm = float(torch.stack([grad.norm() for grad in gradients]).norm())
    for grad in gradients:
        grad.mul_(min(1.0, MAX_NORM / norm))


@broken_tp("tp_optimizers", "in the case's step the optimizer gets wrong gradients")
def dtensor_clipping_by_local_norms() -> TrainingCase:
    return tp_case(
        "dtensor_clipping_by_local_norms", by_plan(plan_for), fields={"step": clipped(clip_local_parts)}
    )


def local_state(model: LM) -> dict[str, Tensor]:
    """What looks like plain weights, and is the part of the rank that saves."""
    return {name: getattr(tensor, "_local_tensor", tensor) for name, tensor in model.state_dict().items()}


@broken_tp(
    "tp_training",
    "the case's state_dict gives one rank's part of embed.weight",
    may_fail=("compile_checkpoint_keys",),
)
def dtensor_checkpoint_of_one_ranks_part() -> TrainingCase:
    return tp_case(
        "dtensor_checkpoint_of_one_ranks_part", by_plan(plan_for), fields={"state_dict": local_state}
    )
