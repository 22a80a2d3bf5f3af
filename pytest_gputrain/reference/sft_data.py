"""Documents to fine-tune on, of unequal lengths, and how they become a batch of one shape.

A document is a question and its answer; only the answer counts in the loss. Tokens are bytes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

MASKED = -100  # what cross_entropy leaves out
PADDING = 0

Batch = dict[str, Tensor]


@dataclass(frozen=True)
class Document:
    """tokens: (length,) int64, at least 2; num_prompt: how many of them, at the start, are the question."""

    tokens: Tensor
    num_prompt: int


def collate(documents: Sequence[Document], max_seq_len: int, *, pads_to_longest: bool = False) -> Batch:
    """``inputs`` and ``targets``, each (documents, max_seq_len) int64: padded to it, and cut where longer.

    The columns are those of the inputs: a document fills them with max_seq_len + 1 tokens, because a target
    is the token after. pads_to_longest: only as far as the longest of these documents, as many collate
    functions do, which is another shape each time.
    """
    longest = max(len(document.tokens) for document in documents) - 1
    length = min(longest, max_seq_len) if pads_to_longest else max_seq_len
    rows = [_padded(document, length) for document in documents]
    inputs, targets = (torch.stack(columns) for columns in zip(*rows, strict=True))
    return {"inputs": inputs, "targets": targets}


def filled(batch: Batch, num_rows: int) -> Batch:
    """The batch with rows up to ``num_rows``, of padding that does not count: a short batch in full shape."""
    lacking = num_rows - len(batch["inputs"])
    if lacking <= 0:
        return batch
    blank = {"inputs": PADDING, "targets": MASKED}
    return {
        name: torch.cat([rows, rows.new_full((lacking, rows.size(1)), blank[name])])
        for name, rows in batch.items()
    }


def num_targets(batch: Batch) -> int:
    """The tokens that count in the loss."""
    return int((batch["targets"] != MASKED).sum())


def _padded(document: Document, length: int) -> tuple[Tensor, Tensor]:
    tokens = document.tokens[: length + 1]
    inputs, targets = torch.full((length,), PADDING), torch.full((length,), MASKED)
    inputs[: len(tokens) - 1] = tokens[:-1]
    first = max(1, document.num_prompt)  # a token that is there without the one before it is no target
    targets[first - 1 : len(tokens) - 1] = tokens[first:]
    return inputs, targets
