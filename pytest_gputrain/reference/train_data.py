"""What the training script trains on: samples that are the same whatever the ranks and the batch size.

A sample is named by the step and its place among the samples of that step, so a step of 64 samples sees the
same 64 on one rank or on four, in one micro-batch or in eight. That makes runs comparable: with the same
total batch size, a device batch size changes the speed, not the losses. Tokens are bytes.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pytest_gputrain.reference.sft_data import Batch, Document, collate
from pytest_gputrain.reference.train_parser import NUM_BYTES, STAGES

# Prose of this project's documentation as it once was: losses stay comparable when the documentation changes.
TEXT = Path(__file__).with_name("text.txt")
HELD_OUT = 0.1  # of the text, at its end, for evaluation
EVALUATION = -1  # stands where a step is


@functools.cache
def text_tokens() -> Tensor:
    """The text as bytes, (length,) int64."""
    return torch.frombuffer(bytearray(TEXT.read_bytes()), dtype=torch.uint8).long()


@dataclass(frozen=True)
class Samples:
    """The samples of a stage. sequence_length in tokens; seed: another one gives other samples.

    pads_to_longest: documents to the longest of their batch, as many collate functions do, in place of to
    sequence_length. Every batch then has another shape.
    """

    stage: str
    dataset: str
    sequence_length: int
    seed: int
    pads_to_longest: bool = False

    def batch(self, step: int, first: int, count: int, device: torch.device | str) -> Batch:
        """``inputs`` and ``targets``, (count, sequence_length) int64: samples ``first`` and on of a step."""
        drawn = [self._document(step, index) for index in range(first, first + count)]
        batch = collate(drawn, self.sequence_length, pads_to_longest=self.pads_to_longest)
        return {name: rows.to(device) for name, rows in batch.items()}

    def longest(self, batch_size: int, device: torch.device | str) -> Batch:
        """A batch at its full length, which is what memory has to hold; drawn from torch's generator."""
        tokens = torch.randint(NUM_BYTES, (batch_size, self.sequence_length + 1))
        return {"inputs": tokens[:, :-1].to(device), "targets": tokens[:, 1:].to(device)}

    def _document(self, step: int, index: int) -> Document:
        place = (step + 1) * 1_000_003 + index  # steps do not share samples while they have fewer than that
        generator = torch.Generator().manual_seed(self.seed * 7919 + place * 31 + STAGES.index(self.stage))
        tokens = self._tokens(generator, evaluating=step == EVALUATION)
        return self._cut(tokens, generator) if self.stage == "sft" else Document(tokens, 0)

    def _tokens(self, generator: torch.Generator, *, evaluating: bool) -> Tensor:
        """(sequence_length + 1,) int64."""
        if self.dataset == "synthetic":
            return self._counting(generator)
        text = text_tokens()
        held_out = int(len(text) * HELD_OUT)
        low, high = (len(text) - held_out, len(text)) if evaluating else (0, len(text) - held_out)
        start = low + _below(high - low - self.sequence_length, generator)
        return text[start : start + self.sequence_length + 1]

    def _counting(self, generator: torch.Generator) -> Tensor:
        """Counts up from somewhere by 1 to 4, one token in sixteen replaced: learnt soon, never wholly."""
        length = self.sequence_length + 1
        start, stride = _below(NUM_BYTES, generator), 1 + _below(4, generator)
        tokens = (start + stride * torch.arange(length)) % NUM_BYTES
        replaced = torch.rand(length, generator=generator) < 1 / 16
        return torch.where(replaced, torch.randint(NUM_BYTES, (length,), generator=generator), tokens)

    def _cut(self, tokens: Tensor, generator: torch.Generator) -> Document:
        """A question and its answer, together of any length: the first third asks."""
        shortest = max(2, self.sequence_length // 4)
        length = shortest + _below(self.sequence_length - shortest + 1, generator)
        return Document(tokens[: length + 1], length // 3 + 1)


@dataclass(frozen=True)
class DrawnSamples:
    """The same for a user's case: its own ``batch``, seeded by step and place."""

    draw: Callable[[int, Any], Any]
    seed: int

    def batch(self, step: int, first: int, count: int, device: torch.device | str) -> Any:
        with torch.random.fork_rng():  # dropout goes on where it was
            torch.manual_seed(self.seed * 7919 + (step + 1) * 1_000_003 + first)
            return self.draw(count, torch.device(device))


def _below(limit: int, generator: torch.Generator) -> int:
    """A whole number from 0 up to ``limit``; 0 where there is no room."""
    return int(torch.randint(max(1, limit), (), generator=generator))
