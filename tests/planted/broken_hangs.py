"""Ranks that hang, crash or raise: the launch's verdict becomes the check's."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel as DDP
from torch.utils.checkpoint import checkpoint

from pytest_gputrain.case import TrainingCase
from tests.planted.plant import WIDTH, Net, broken, case, draw, loss, rank

HANG = 24.0  # seconds


class UnusedOnOneRank(Net):
    def __init__(self) -> None:
        super().__init__()
        self.extra = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x if rank() == 1 else self.extra(x))


@broken({"ddp_completes": ""}, may_fail=("ddp_parity",), timeout=HANG)
def unused_parameter_on_one_rank() -> TrainingCase:
    return case("unused_parameter_on_one_rank", model=UnusedOnOneRank)


def conditional_collective_step(model: Any, optimizer: Any, micro_batches: Any) -> Tensor:
    optimizer.zero_grad()
    value = loss(model, micro_batches[0])
    value.backward()
    optimizer.step()
    if rank() == 0 and dist.get_world_size() > 1:
        dist.all_reduce(value.detach())  # "only the first rank logs"
    return value.detach()


@broken({"ddp_completes": "(1 x float32)"}, may_fail=("ddp_parity",), timeout=HANG)
def conditional_collective() -> TrainingCase:
    return case("conditional_collective", step=conditional_collective_step)


class LeavesEarly:
    def __init__(self) -> None:
        self.steps = 0

    def __call__(self, model: Any, optimizer: Any, micro_batches: Any) -> Tensor:
        self.steps += 1
        if rank() == 1 and self.steps == 3:
            raise SystemExit(0)  # "the data is used up"
        optimizer.zero_grad()
        value = loss(model, micro_batches[0])
        value.backward()
        optimizer.step()
        return value.detach()


@broken({"ddp_completes": "rank 1"}, may_fail=("ddp_parity",), timeout=HANG)
def rank_dependent_early_exit() -> TrainingCase:
    return case("rank_dependent_early_exit", step=LeavesEarly())


def uneven_batches() -> Iterator[Any]:
    for _ in range(4 if rank() == 0 else 3):
        yield draw(4, "cpu")


@broken({"ddp_completes": "ranks have different numbers of batches (rank 0: 4 or more, rank 1: 3)"})
def uneven_inputs() -> TrainingCase:
    return case("uneven_inputs", batches=uneven_batches)


def much_later_uneven_batches() -> Iterator[Any]:
    for _ in range(20 + rank()):
        yield draw(4, "cpu")


@broken({"ddp_completes": "ranks have different numbers of batches (rank 0: 20, rank 1: 21)"})
def uneven_inputs_far_away() -> TrainingCase:
    return case("uneven_inputs_far_away", batches=much_later_uneven_batches)


def sized_by_rank() -> nn.Module:
    return nn.Sequential(nn.Linear(WIDTH, 8 + rank()), nn.ReLU(), nn.Linear(8 + rank(), 4))


@broken({"ddp_completes": ""}, may_fail=("ddp_parity",), timeout=HANG)
def mismatched_shape() -> TrainingCase:
    return case("mismatched_shape", model=sized_by_rank)


def typed_by_rank() -> nn.Module:
    return Net().double() if rank() == 1 else Net()


def any_type_loss(model: Any, batch: Any) -> Tensor:
    kind = next(model.parameters()).dtype
    return F.cross_entropy(model(batch["x"].to(kind)), batch["y"])


@broken({"ddp_completes": ""}, may_fail=("ddp_parity",), timeout=HANG)
def mismatched_dtype() -> TrainingCase:
    return case("mismatched_dtype", model=typed_by_rank, loss=any_type_loss)


class StaticGraphChanges(Net):
    calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        if self.calls > 2:
            x = self.blocks[0](x)
            out: Tensor = self.head(x)
            return out
        return super().forward(x)


def static(model: Any) -> nn.Module:
    return DDP(model, static_graph=True)


@broken(
    {"ddp_completes": ""},
    may_fail=("ddp_parity", "gradients_arrive", "accumulation_schedule", "compile_no_recompiles"),
    timeout=HANG,
)
def changed_static_graph() -> TrainingCase:
    return case("changed_static_graph", model=StaticGraphChanges, wrap=static)


class ReentrantCheckpoint(Net):
    on = False

    def forward(self, x: Tensor) -> Tensor:
        x = x.requires_grad_()
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=True) if self.on else block(x)
        out: Tensor = self.head(x)
        return out


def find_unused(model: Any) -> nn.Module:
    return DDP(model, find_unused_parameters=True)


def reentrant_on(model: Any, layers: slice | None) -> None:
    model.on = True


@broken({"ddp_completes": "mark a variable ready only once"})
def reentrant_checkpoint_with_find_unused() -> TrainingCase:
    return case(
        "reentrant_checkpoint_with_find_unused",
        model=ReentrantCheckpoint,
        wrap=find_unused,
        set_checkpointing=reentrant_on,
    )


class SkipsOnRank:
    """One rank leaves a bad batch out without telling the others, at the fourth step."""

    def __init__(self) -> None:
        self.steps = 0

    def __call__(self, model: Any, optimizer: Any, micro_batches: Any) -> Tensor | None:
        self.steps += 1
        if rank() == 1 and self.steps == 4:
            return None
        optimizer.zero_grad()
        value = loss(model, micro_batches[0])
        value.backward()
        optimizer.step()
        return value.detach()


@broken({"ddp_completes": "HUNG"}, may_fail=("ddp_parity",), timeout=HANG)
def one_rank_skips_a_batch() -> TrainingCase:
    return case("one_rank_skips_a_batch", step=SkipsOnRank())
