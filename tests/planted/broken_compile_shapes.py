"""Broken programs whose batches make torch compile anew: lengths, types, the last batch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pytest_gputrain.case import TrainingCase
from tests.planted.plant import Net, broken, case, draw

VOCABULARY, LENGTH = 32, 16


class Tagger(nn.Module):
    """Tokens (batch, length) -> scores of the next token; a mask of the same shape hides padding."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, 16)
        self.net = Net()
        self.head = nn.Linear(4, VOCABULARY)

    def forward(self, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
        x = self.embed(tokens)
        if mask is not None:
            x = x * mask.unsqueeze(-1)
        scores: Tensor = self.head(self.net(x))
        return scores


def tokens(batch_size: int, device: Any, length: int = LENGTH) -> dict[str, Tensor]:
    drawn = torch.randint(VOCABULARY, (batch_size, length + 1))
    return {"inputs": drawn[:, :-1].to(device), "targets": drawn[:, 1:].to(device)}


def next_token_loss(model: Any, batch: Any) -> Tensor:
    scores = model(batch["inputs"])
    return F.cross_entropy(scores.flatten(0, 1), batch["targets"].flatten(), ignore_index=-100)


def tagger(name: str, **fields: Any) -> TrainingCase:
    return case(name, **{"model": Tagger, "batch": tokens, "loss": next_token_loss, **fields})


class Documents(torch.utils.data.Dataset[Tensor]):
    """Token sequences of many lengths, the same in every process."""

    def __init__(self, number: int = 60, longest: int = 61) -> None:
        lengths = torch.Generator().manual_seed(3)
        self._lengths = torch.randint(20, longest + 1, (number,), generator=lengths).tolist()

    def __len__(self) -> int:
        return len(self._lengths)

    def __getitem__(self, index: int) -> Tensor:
        return torch.arange(self._lengths[index] + 1) % VOCABULARY


def pad_to_longest(documents: list[Tensor]) -> dict[str, Tensor]:
    padded = nn.utils.rnn.pad_sequence(documents, batch_first=True, padding_value=0)
    targets = nn.utils.rnn.pad_sequence([d[1:] for d in documents], batch_first=True, padding_value=-100)
    return {"inputs": padded[:, :-1], "targets": targets}


def padded_to_longest() -> Any:
    return torch.utils.data.DataLoader(Documents(), batch_size=4, collate_fn=pad_to_longest)


@broken(
    {
        "batch_shapes_constant": "collate function pad_to_longest (broken_compile_shapes.py:",
        "compile_no_recompiles": "graphs, then torch ran eager (recompile limit 8) from step",
    },
    may_fail=("compile_parity", "ddp_data_differs"),  # every rank reads the same stream
)
def lengths_padded_to_the_longest() -> TrainingCase:
    return tagger("lengths_padded_to_the_longest", batches=padded_to_longest)


def off_by_one() -> Iterator[Any]:
    """Every third batch was cut before it was shifted."""
    for step in range(12):
        yield tokens(4, "cpu", 63 if step % 3 == 2 else 64)


@broken(
    {"batch_shapes_constant": "64 would do, not 63"},
    may_fail=("compile_no_recompiles",),
)
def a_column_short_now_and_then() -> TrainingCase:
    return tagger("a_column_short_now_and_then", batches=off_by_one)


def doubles_in_between() -> Iterator[Any]:
    """What came through numpy is float64."""
    for step in range(16):
        batch = draw(4, "cpu")
        yield {**batch, "x": batch["x"].double()} if step % 5 == 4 else batch


def any_type_loss(model: Any, batch: Any) -> Tensor:
    return F.cross_entropy(model(batch["x"]), batch["y"])


class AnyType(Net):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.float())


@broken(
    {
        "batch_shapes_constant": "['x'] is float32 in batch 0 and float64 in batch 4",
        "compile_no_recompiles": "dtype mismatch",
    }
)
def another_type_in_between() -> TrainingCase:
    return case("another_type_in_between", model=AnyType, loss=any_type_loss, batches=doubles_in_between)


def short_at_the_end() -> Any:
    everything: Any = [{"x": torch.randn(16), "y": torch.tensor(1)} for _ in range(131)]
    return torch.utils.data.DataLoader(everything, batch_size=4, num_workers=1)


@broken(
    {
        "batch_shapes_constant": "in batch 32, the last",
        "compile_no_recompiles": "batch 32: ['x'] is (3, 16), in step 0 (4, 16)",
    }
)
def last_batch_is_short() -> TrainingCase:
    return case("last_batch_is_short", batches=short_at_the_end)


def mask_now_and_then() -> Iterator[Any]:
    for step in range(12):
        batch = tokens(4, "cpu")
        yield {**batch, "mask": torch.ones(4, LENGTH)} if step == 7 else batch


def masked_loss(model: Any, batch: Any) -> Tensor:
    scores = model(batch["inputs"], batch.get("mask"))
    return F.cross_entropy(scores.flatten(0, 1), batch["targets"].flatten())


@broken(
    {
        "batch_shapes_constant": "['mask'] is not there in batch 0 and (4, 16) float32 in batch 7",
        "compile_no_recompiles": "after warm-up (3 steps), the first in step 7",
    }
)
def mask_in_some_batches_only() -> TrainingCase:
    return tagger("mask_in_some_batches_only", loss=masked_loss, batches=mask_now_and_then)


def cut_in_the_loss(model: Any, batch: Any) -> Tensor:
    """The batch is padded well, and then cut to its longest row."""
    longest = int((batch["inputs"] != 0).sum(1).max())
    scores = model(batch["inputs"][:, :longest])
    return F.cross_entropy(scores.flatten(0, 1), batch["targets"][:, :longest].flatten())


def padded_rows(batch_size: int, device: Any) -> dict[str, Tensor]:
    batch = tokens(batch_size, "cpu")
    length = int(torch.randint(4, LENGTH, ()))
    inside = torch.arange(LENGTH) < length
    inputs = batch["inputs"].clamp(min=1) * inside
    return {"inputs": inputs.to(device), "targets": batch["targets"].to(device)}


@broken({"compile_no_recompiles": "cuts them to what each holds"}, may_fail=("accumulation_parity",))
def padding_cut_off_in_the_loss() -> TrainingCase:
    return tagger("padding_cut_off_in_the_loss", batch=padded_rows, loss=cut_in_the_loss)


def longer_in_evaluation(model: Any, batch: Any) -> Tensor:
    """Evaluation does not cut, and its lengths are drawn."""
    inputs = batch["inputs"]
    if not model.training:
        inputs = inputs[:, : int(torch.randint(2, LENGTH, ()))]
    scores = model(inputs)
    return F.cross_entropy(scores.flatten(0, 1), batch["targets"][:, : inputs.shape[1]].flatten())


@broken({"compile_no_recompiles": "evaluation, batch 1"}, may_fail=("batch_size_holds",))
def lengths_that_vary_in_evaluation() -> TrainingCase:
    return tagger("lengths_that_vary_in_evaluation", loss=longer_in_evaluation)
