"""Broken in how much memory training takes: it grows, or comes late, or was never as small as it looked."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pytest_gputrain.case import TrainingCase
from tests.planted.broken_finders import Deep, tokens
from tests.planted.healthy_models import next_token_loss
from tests.planted.plant import WIDTH, Net, broken, case, loss, rank

history: list[Tensor] = []


def remembered_step(model: Any, optimizer: Any, micro_batches: Any) -> Tensor:
    optimizer.zero_grad()
    value = loss(model, micro_batches[0])
    value.backward(retain_graph=True)
    history.append(value)
    optimizer.step()
    return value


@broken(
    {"batch_size_holds": "global `history`["},
    may_fail=("batch_size_found", "gradients_arrive", "ddp_completes"),
)
def losses_kept_with_their_graph() -> TrainingCase:
    return case("losses_kept_with_their_graph", step=remembered_step)


class Remembers(Net):
    """Keeps what it saw, for a picture that nobody draws."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        out = super().forward(x)
        if self.training:
            self.seen.append(out.detach())
        return out


@broken({"batch_size_holds": "held by `model`.seen["}, may_fail=("batch_size_found",))
def outputs_kept_by_the_model() -> TrainingCase:
    return case("outputs_kept_by_the_model", model=Remembers)


def remembering_step() -> Any:
    kept: dict[int, Tensor] = {}

    def step(model: Any, optimizer: Any, micro_batches: Any) -> Tensor:
        optimizer.zero_grad()
        features = model.blocks[0](micro_batches[0]["x"])
        kept[len(kept)] = features.mean(1)
        value = loss(model, micro_batches[0])
        value.backward()
        optimizer.step()
        return value.detach()

    return step


@broken({"batch_size_holds": "> `kept` in the closure of remembering_step"}, may_fail=("batch_size_found",))
def features_kept_by_a_closure() -> TrainingCase:
    return case("features_kept_by_a_closure", step=remembering_step())


class Every:
    """Keeps the logits of every so many steps, for a picture."""

    def __init__(self, interval: int) -> None:
        self.interval, self.steps = interval, 0
        self.pictures: list[Tensor] = []

    def __call__(self, model: Any, optimizer: Any, micro_batches: Any) -> Tensor:
        optimizer.zero_grad()
        value = next_token_loss(model, micro_batches[0])
        value.backward()
        optimizer.step()
        self.steps += 1
        if self.steps % self.interval == 0:
            self.pictures.append(model(micro_batches[0][0]).detach())
        return value.detach()


@broken({"batch_size_holds": "held by `step`.pictures["}, may_fail=("batch_size_found",))
def logits_kept_every_twelve_steps() -> TrainingCase:
    return tokens("logits_kept_every_twelve_steps", step=Every(12))


class Memory(Deep):
    """A bank of features to which every step adds."""

    bank: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("bank", torch.zeros(0, WIDTH), persistent=False)

    def forward(self, tokens: Tensor) -> Tensor:
        if self.training:
            self.bank = torch.cat([self.bank, self.embedding(tokens).detach().mean(1)])
        return super().forward(tokens)


@broken({"batch_size_holds": "held by `model`.bank"}, may_fail=("batch_size_found",))
def buffer_that_grows() -> TrainingCase:
    return tokens("buffer_that_grows", model=Memory)


class KeepsLogits(Deep):
    """What evaluation saw, never cleared."""

    def __init__(self) -> None:
        super().__init__()
        self.logits: list[Tensor] = []

    def forward(self, tokens: Tensor) -> Tensor:
        out = super().forward(tokens)
        if not self.training:
            self.logits.append(out)
        return out


@broken({"batch_size_holds": "held by `model`.logits["}, may_fail=("batch_size_found",))
def evaluation_keeps_its_logits() -> TrainingCase:
    return tokens("evaluation_keeps_its_logits", model=KeepsLogits)


def with_a_hook(kept: list[Tensor]) -> Any:
    def model() -> Deep:
        made = Deep()
        made.blocks.register_forward_hook(lambda module, inputs, out: kept.append(out.detach()))
        return made

    return model


@broken({"batch_size_holds": "> `kept` in the closure of with_a_hook"}, may_fail=("batch_size_found",))
def hook_that_appends() -> TrainingCase:
    return tokens("hook_that_appends", model=with_a_hook([]))


def ragged_draw(batch_size: int, device: Any) -> Any:
    """As short as most are."""
    return sentences(batch_size, 8, device)


def sentences(batch_size: int, length: int, device: Any) -> Any:
    tokens = torch.randint(32, (batch_size, length + 1)).to(device)
    return tokens[:, :-1], tokens[:, 1:]


def one_long_among_short() -> Iterator[Any]:
    for index in range(40):
        yield sentences(4, 64 if index == 30 else 8, torch.device("cpu"))


@broken({"batch_size_holds": "memory runs out in batch 30 of batches(): (5, 64) and (5, 64), where "})
def longer_sequences_come_later() -> TrainingCase:
    return tokens("longer_sequences_come_later", batch=ragged_draw, batches=one_long_among_short)


def longer_on_the_second_rank(batch_size: int, device: Any) -> Any:
    """The corpus is sorted by length, and each rank has its share."""
    return sentences(batch_size, 32 if rank() else 8, device)


@broken({"batch_size_holds": "memory runs out on rank 1 in step 0"}, may_fail=("ddp_parity",))
def rank_with_longer_samples() -> TrainingCase:
    return tokens("rank_with_longer_samples", batch=longer_on_the_second_rank)


class PoolByLength(Deep):
    """A workspace for each length, kept: memory is in pieces that no other length can use."""

    def __init__(self) -> None:
        super().__init__()
        self.pool: dict[int, Tensor] = {}

    def forward(self, tokens: Tensor) -> Tensor:
        length = tokens.shape[1]
        if length not in self.pool or len(self.pool[length]) < len(tokens):
            self.pool[length] = torch.zeros(len(tokens), length, 16 * WIDTH)
        out: Tensor = super().forward(tokens) + self.pool[length].mean()
        return out


def every_length() -> Iterator[Any]:
    for index in range(40):
        yield sentences(4, 8 - index % 8, torch.device("cpu"))


@broken({"batch_size_holds": "of batches()"})
def pool_in_pieces_by_length() -> TrainingCase:
    return tokens("pool_in_pieces_by_length", model=PoolByLength, batch=ragged_draw, batches=every_length)


class AveragesLate:
    """Keeps moving averages of the weights from a step on."""

    def __init__(self, first: int = 6) -> None:
        self.first = first
        self.average: Any = None

    def __call__(self, model: Any, optimizer: Any, micro_batches: Any) -> Tensor:
        optimizer.zero_grad()
        value = next_token_loss(model, micro_batches[0])
        value.backward()
        optimizer.step()
        steps = int(next(iter(optimizer.state.values()))["step"])
        if steps == self.first:
            self.average = [[p.detach().clone() for p in model.parameters()] for _ in range(2)]
        elif steps < self.first:
            self.average = None
        return value.detach()


@broken(
    {"batch_size_holds": "memory runs out in step"},
    may_fail=("ddp_parity", "batch_size_found"),  # the average stays
)
def average_of_the_weights_comes_late() -> TrainingCase:
    return tokens("average_of_the_weights_comes_late", step=AveragesLate())


@broken(
    {"batch_size_holds": "memory runs out in step"},
    may_fail=("ddp_parity", "batch_size_found"),
)
def average_of_the_weights_comes_after_a_warm_up() -> TrainingCase:
    return tokens("average_of_the_weights_comes_after_a_warm_up", step=AveragesLate(15))


def misspelt_loss(model: Any, batch: Any) -> Tensor:
    return F.cross_entropy(model(batch["x"]), batch["y"], reduce_by="mean")  # type: ignore[call-arg]


@broken(
    {
        "batch_size_found": "TypeError: cross_entropy() got an unexpected keyword argument 'reduce_by'",
        "batch_size_holds": "TypeError: cross_entropy() got an unexpected keyword argument 'reduce_by'",
    },
    may_fail=("gradients_arrive", "optimizer_covers", "ddp_completes", "ddp_parity"),
)
def type_error_in_the_loss() -> TrainingCase:
    return case("type_error_in_the_loss", loss=misspelt_loss)
