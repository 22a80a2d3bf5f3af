"""Broken on one process already: gradients, optimizers, activation checkpointing."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from pytest_gputrain.case import TrainingCase
from tests.planted.plant import WIDTH, Block, Net, broken, case, loss


class WithUnused(Net):
    def __init__(self) -> None:
        super().__init__()
        self.unused = nn.Linear(WIDTH, WIDTH)


@broken(
    {
        "gradients_arrive": "2 of 16 trainable parameters got no gradient",
        "ddp_completes": "RuntimeError: no gradient in the last step for ",
    },
    may_fail=("ddp_parity",),
)
def unused_parameter() -> TrainingCase:
    return case("unused_parameter", model=WithUnused)


class WithDetachedBranch(Net):
    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x + self.gate(x).detach())


@broken(
    {
        "gradients_arrive": "gate.weight (in gate, Linear)",
        "ddp_completes": "RuntimeError: no gradient in the last step for ",
    },
    may_fail=("ddp_parity",),
)
def detached_branch() -> TrainingCase:
    return case("detached_branch", model=WithDetachedBranch)


def no_backward_step(model: Any, optimizer: Any, micro_batches: Any) -> Tensor:
    optimizer.zero_grad()
    value = loss(model, micro_batches[0])
    optimizer.step()
    return value.detach()


@broken(
    {"gradients_arrive": "never calls backward()"},
    may_fail=("ddp_parity", "ddp_completes", "compile_parity"),
)
def step_without_backward() -> TrainingCase:
    return case("step_without_backward", step=no_backward_step)


def constant_loss(model: Any, batch: Any) -> Tensor:
    return loss(model, batch) * 0.0 + 1.0


@broken({"gradients_arrive": "every gradient is exactly zero"}, may_fail=("ddp_parity",))
def loss_that_is_constant() -> TrainingCase:
    return case("loss_that_is_constant", loss=constant_loss)


def nan_loss(model: Any, batch: Any) -> Tensor:
    out = model(batch["x"])
    return loss(model, batch) + torch.sqrt((out - out).sum())  # the root's slope at zero is infinite


@broken(
    {"gradients_arrive": "NaN or infinite gradient", "optimizer_covers": "are NaN or infinite after step 0"},
    may_fail=("ddp_parity", "ddp_completes", "compile_parity"),
)
def nan_gradient() -> TrainingCase:
    return case("nan_gradient", loss=nan_loss)


def frozen_model() -> nn.Module:
    return Net().requires_grad_(False)


@broken(
    {"gradients_arrive": "nothing trains"},
    may_fail=("optimizer_covers", "ddp_completes", "ddp_parity", "compile_parity", "compile_no_recompiles"),
)
def everything_frozen() -> TrainingCase:
    return case("everything_frozen", model=frozen_model)


def without_head(model: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW([p for n, p in model.named_parameters() if "head" not in n], lr=1e-3)


@broken({"optimizer_covers": "head.weight (in head, Linear)"})
def parameter_missing_from_optimizer() -> TrainingCase:
    return case("parameter_missing_from_optimizer", optimizer=without_head)


def over_a_copy(model: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(copy.deepcopy(model).parameters(), lr=1e-3)


@broken({"optimizer_covers": "built over a copy"}, may_fail=("ddp_parity",))
def optimizer_over_a_copy() -> TrainingCase:
    return case("optimizer_over_a_copy", optimizer=over_a_copy)


def zero_rate_for_blocks(model: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(
        [{"params": model.blocks.parameters(), "lr": 0.0}, {"params": model.head.parameters()}], lr=0.1
    )


@broken({"optimizer_covers": "learning rate is 0"})
def group_with_zero_rate() -> TrainingCase:
    return case("group_with_zero_rate", optimizer=zero_rate_for_blocks)


def forgetful_step(model: Any, optimizer: Any, micro_batches: Any) -> Tensor:
    optimizer.zero_grad()
    value = loss(model, micro_batches[0])
    value.backward()
    return value.detach()


@broken({"optimizer_covers": "never calls optimizer.step()"}, may_fail=("ddp_parity",))
def step_without_update() -> TrainingCase:
    return case("step_without_update", step=forgetful_step)


def clearing_step(model: Any, optimizer: Any, micro_batches: Any) -> Tensor:
    value = loss(model, micro_batches[0])
    value.backward()
    optimizer.zero_grad()
    optimizer.step()
    return value.detach()


@broken({"optimizer_covers": "cleared before the optimizer steps"})
def gradients_cleared_too_early() -> TrainingCase:
    return case("gradients_cleared_too_early", step=clearing_step)


class TwoOptimizers:
    """Both hold the head."""

    def __init__(self, model: Any) -> None:
        self.one = torch.optim.AdamW(model.parameters(), lr=1e-3)
        self.two = torch.optim.SGD(model.head.parameters(), lr=1e-3)

    def zero_grad(self, set_to_none: bool = True) -> None:
        self.one.zero_grad()

    def step(self) -> None:
        self.one.step()
        self.two.step()


@broken({"optimizer_covers": "updated twice a step, by AdamW and SGD"})
def head_in_two_optimizers() -> TrainingCase:
    return case("head_in_two_optimizers", optimizer=TwoOptimizers)


class HiddenLayers(Net):
    def __init__(self) -> None:
        super().__init__()
        self.more = [nn.Linear(WIDTH, WIDTH)]

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(self.more[0](x))


@broken(
    {"optimizer_covers": "not registered in the model and in no optimizer group: more[0].weight"},
    may_fail=("compile_checkpoint_keys",),  # nor in its state_dict
)
def layers_in_a_plain_list() -> TrainingCase:
    return case("layers_in_a_plain_list", model=HiddenLayers)


class CheckpointedNet(Net):
    """Checkpointing done right; the broken ones below change one thing."""

    def __init__(self, depth: int = 3, dropout: float = 0.0) -> None:
        super().__init__(depth)
        self.dropout = nn.Dropout(dropout)
        self.checkpointed: frozenset[int] = frozenset()

    def turn_on(self, layers: slice | None) -> None:
        self.checkpointed = frozenset(range(len(self.blocks))[layers or slice(None)])

    def run(self, block: nn.Module, x: Tensor) -> Tensor:
        out: Tensor = checkpoint(lambda y: self.dropout(block(y)), x, use_reentrant=False)
        return out

    def forward(self, x: Tensor) -> Tensor:
        for index, block in enumerate(self.blocks):
            x = self.run(block, x) if index in self.checkpointed else self.dropout(block(x))
        out: Tensor = self.head(x)
        return out


def turn_on(model: Any, layers: slice | None) -> None:
    model.turn_on(layers)


class LateBinding(CheckpointedNet):
    def forward(self, x: Tensor) -> Tensor:
        for index, block in enumerate(self.blocks):
            if index in self.checkpointed:
                # By the time backward recomputes, `block` is the last one.
                x = checkpoint(lambda y: block(y), x, use_reentrant=False)  # noqa: B023
            else:
                x = block(x)
        out: Tensor = self.head(x)
        return out


@broken({"checkpointing_parity": "gradients differ with checkpointing on"}, may_fail=("ddp_completes",))
def checkpoint_lambda_bound_late() -> TrainingCase:
    return case("checkpoint_lambda_bound_late", model=LateBinding, set_checkpointing=turn_on)


class LateBindingBehindZeros(LateBinding):
    """Nothing but the head gets a gradient before the head has moved, and it hardly moves."""

    def __init__(self) -> None:
        super().__init__()
        nn.init.zeros_(self.head.weight)


def hardly_moving(model: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=1e-9)


@broken({"checkpointing_parity": "gradients differ with checkpointing on"}, may_fail=("ddp_completes",))
def checkpoint_bound_late_behind_a_zero_head() -> TrainingCase:
    return case(
        "checkpoint_bound_late_behind_a_zero_head",
        model=LateBindingBehindZeros,
        optimizer=hardly_moving,
        set_checkpointing=turn_on,
    )


class ForgetsRandomState(CheckpointedNet):
    def __init__(self) -> None:
        super().__init__(dropout=0.5)

    def run(self, block: nn.Module, x: Tensor) -> Tensor:
        out: Tensor = checkpoint(
            lambda y: self.dropout(block(y)), x, use_reentrant=False, preserve_rng_state=False
        )
        return out


@broken({"checkpointing_parity": "the loss is the same"})
def checkpoint_forgets_random_state() -> TrainingCase:
    return case("checkpoint_forgets_random_state", model=ForgetsRandomState, set_checkpointing=turn_on)


class NeverReads(CheckpointedNet):
    def forward(self, x: Tensor) -> Tensor:
        return Net.forward(self, x)


@broken({"checkpointing_parity": "set_checkpointing changes nothing"})
def checkpointing_does_nothing() -> TrainingCase:
    return case("checkpointing_does_nothing", model=NeverReads, set_checkpointing=turn_on)


class CountingBlock(Block):
    calls: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return super().forward(x) * (1 + 0.1 * float(self.calls % 2))


class ChangesState(CheckpointedNet):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(CountingBlock() for _ in range(2))


@broken(
    {"checkpointing_parity": "gradients differ with checkpointing on"},
    may_fail=("compile_no_recompiles",),  # it reads its state as a number
)
def layer_changes_state_when_recomputed() -> TrainingCase:
    return case("layer_changes_state_when_recomputed", model=ChangesState, set_checkpointing=turn_on)
