"""Tensor parallelism that does the right thing at the wrong moment: too early, or once more."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from pytest_gputrain.case import TrainingCase
from tests.planted.tp_loops import clipped
from tests.planted.tp_megatron import SequenceParallel, all_reduce, by
from tests.planted.tp_model import broken_tp, tp_case
from tests.planted.tp_overlap import OverlappedColumn, Overlapping


class HastyColumn(OverlappedColumn):
    waits = False


class Hasty(Overlapping):
    kind = HastyColumn


@broken_tp("tp_backward", "blocks.1.mlp.up: the all_reduce started at ")
def gradients_used_before_their_sum_has_come() -> TrainingCase:
    return tp_case("gradients_used_before_their_sum_has_come", by(Hasty))


class SummedAsItAccumulates(SequenceParallel):
    def sum_gradient(self, parameter: nn.Parameter) -> None:
        def summed(held: Tensor) -> None:
            held.grad = all_reduce(held.grad, self.group)  # type: ignore[arg-type]

        parameter.register_post_accumulate_grad_hook(summed)


def not_clipped(parameters: list[Any]) -> None:
    pass


@broken_tp("tp_optimizers", "wrong gradients after 2 micro-batches, and the right ones after one")
def gradients_summed_again_by_each_micro_batch() -> TrainingCase:
    return tp_case(
        "gradients_summed_again_by_each_micro_batch",
        by(SummedAsItAccumulates),
        fields={"step": clipped(not_clipped)},
    )
