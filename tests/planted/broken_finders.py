"""Finders of a batch size with one known defect each, on programs where it matters."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from pytest_gputrain.case import TrainingCase
from tests.planted import finders
from tests.planted.healthy_models import convnet, image_draw, image_loss, next_token_loss, token_draw
from tests.planted.plant import WIDTH, Block, broken, case


class Deep(nn.Module):
    """Tokens (batch, 32): more activations than weights."""

    def __init__(self, width: int = WIDTH) -> None:
        super().__init__()
        self.embedding = nn.Embedding(32, width)
        self.blocks = nn.Sequential(*(Block(width) for _ in range(2)))
        self.head = nn.Linear(width, 32)

    def forward(self, tokens: Tensor) -> Tensor:
        out: Tensor = self.head(self.blocks(self.embedding(tokens)))
        return out


def tokens(name: str, **fields: Any) -> TrainingCase:
    return case(name, **{"model": Deep, "batch": token_draw, "loss": next_token_loss, **fields})


@broken(
    {"batch_size_found": "memory runs out in step 1"},
    may_fail=("batch_size_holds",),
    finder=finders.takes_no_update,
)
def probe_without_optimizer_step() -> TrainingCase:
    return case("probe_without_optimizer_step")


class Momentum(torch.optim.SGD):
    """Its state, of several copies of the weights, comes with the first step."""

    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            for parameter in group["params"]:
                self.state[parameter].setdefault("history", torch.zeros(8, *parameter.shape))
        return super().step(closure)


def many_copies(model: Any) -> torch.optim.Optimizer:
    return Momentum(model.parameters(), lr=0.1)


@broken(
    {
        "batch_size_found": "memory runs out in step 1",
        "batch_size_holds": "its state lies beside activations",
    },
    finder=finders.takes_no_update,
)
def state_of_the_first_update_does_not_fit() -> TrainingCase:
    return tokens("state_of_the_first_update_does_not_fit", optimizer=many_copies)


class KeepsAllWhenEvaluated(Deep):
    """All pairs of positions, for a picture, when it is evaluated."""

    def forward(self, tokens: Tensor) -> Tensor:
        if not self.training:
            hidden = self.embedding(tokens).flatten(0, 1)
            self.pairs = (hidden[:, None] - hidden[None]).square()
            self.pairs = self.pairs.mean()
        return super().forward(tokens)


@broken(
    {
        "batch_size_found": "memory runs out in evaluation",
        "batch_size_holds": "memory runs out in evaluation after step 1",
    },
    finder=finders.never_evaluates,
)
def only_evaluation_runs_out() -> TrainingCase:
    return tokens("only_evaluation_runs_out", model=KeepsAllWhenEvaluated)


@broken(
    {"batch_size_found": "of memory in use"},
    may_fail=("batch_size_holds",),
    finder=finders.keeps_the_traceback,
)
def traceback_kept_for_the_log() -> TrainingCase:
    return tokens("traceback_kept_for_the_log")


@broken({"batch_size_found": "fits, too"}, finder=finders.powers_of_two)
def only_powers_of_two() -> TrainingCase:
    return tokens("only_powers_of_two")


@broken({"batch_size_found": "which does not divide 1"}, finder=finders.ignores_the_global_batch)
def size_that_does_not_divide() -> TrainingCase:
    return tokens("size_that_does_not_divide")


@broken({"batch_size_found": "fits, too"}, may_fail=("batch_size_holds",), finder=finders.margin_on_the_size)
def margin_that_rounds_to_zero() -> TrainingCase:
    return tokens("margin_that_rounds_to_zero")


class Stateful(Deep):
    """Carries a state over from batch to batch, for two sequences at most."""

    carried: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("carried", torch.zeros(2, 1, WIDTH))

    def forward(self, tokens: Tensor) -> Tensor:
        out: Tensor = self.head(self.blocks(self.embedding(tokens) + self.carried[: len(tokens)]))
        return out


@broken(
    {"batch_size_found": "is 0, but 1 fits, too: "},
    may_fail=("batch_size_holds",),
    finder=finders.margin_on_the_size,
)
def margin_that_leaves_no_sample() -> TrainingCase:
    return tokens("margin_that_leaves_no_sample", model=Stateful)


class DetourWhenOdd(Deep):
    """A kernel for even batches and for small ones; others take a detour, with three times as much."""

    def forward(self, tokens: Tensor) -> Tensor:
        if len(tokens) % 2 == 0 or len(tokens) < 5:
            return super().forward(tokens)
        return super().forward(torch.cat([tokens] * 3))[: len(tokens)]


@broken(
    {"batch_size_found": "is 22, but at 22 memory runs out in"},
    may_fail=("batch_size_holds",),
    finder=finders.extrapolates,
)
def believes_a_line_where_memory_is_not_monotone() -> TrainingCase:
    return tokens("believes_a_line_where_memory_is_not_monotone", model=DetourWhenOdd)


@broken(
    {"batch_size_found": "a TypeError in the training step is taken for out of memory"},
    finder=finders.takes_any_error_for_memory,
)
def any_error_is_taken_for_memory() -> TrainingCase:
    return tokens("any_error_is_taken_for_memory")


@broken(
    {
        "batch_size_found": (
            "buffers (1.running_mean, 1.running_var, 1.num_batches_tracked, ...), random state (torch)"
        )
    },
    finder=finders.moves_the_model,
)
def probe_that_moves_batchnorm_and_random_state() -> TrainingCase:
    return case(
        "probe_that_moves_batchnorm_and_random_state", model=convnet, batch=image_draw, loss=image_loss
    )


@broken({"batch_size_found": "not so before: random state (torch)\n"}, finder=finders.draws_a_batch)
def probe_that_moves_the_random_state() -> TrainingCase:
    return tokens("probe_that_moves_the_random_state")


@broken(
    {"batch_size_found": "optimizer state (step of parameter 0"}, finder=finders.keeps_the_optimizers_state
)
def optimizer_not_restored() -> TrainingCase:
    return tokens("optimizer_not_restored")


@broken(
    {"batch_size_found": "train mode (the model, embedding, blocks, ...), global switches (cudnn.benchmark)"},
    finder=finders.leaves_evaluation_mode,
)
def left_in_evaluation_mode() -> TrainingCase:
    return tokens("left_in_evaluation_mode")


def double() -> nn.Module:
    return Deep().double()


narrow = tokens("stale_cache_after_a_dtype_change")


@broken(
    {
        "batch_size_found": "memory runs out in",
        "batch_size_holds": "memory runs out in step 0",
    },
    finder=finders.cached_by_name(narrow),
)
def stale_cache_after_a_dtype_change() -> TrainingCase:
    return tokens("stale_cache_after_a_dtype_change", model=double)


@broken(
    {
        "batch_size_found": "the finder raised instead of giving a batch size: JSONDecodeError",
        "batch_size_holds": "the finder raised instead of giving a batch size: JSONDecodeError",
    },
    finder=finders.reads_garbage,
)
def garbage_in_the_cache() -> TrainingCase:
    return tokens("garbage_in_the_cache")
