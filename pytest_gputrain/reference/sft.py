"""Fine-tuning on documents as a `TrainingCase`: unequal lengths, only the answers count, one fixed shape.

An example for your own: ``batches`` is the real stream, through the collate function of the real loader, and
pads to a fixed length, so that a model compiled with ``dynamic=False`` is compiled once. ``case_longest``
pads to the longest of each batch instead: what `batch_shapes_constant` is there for. Importing this imports
no torch.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pytest_gputrain.case import TrainingCase
from pytest_gputrain.reference.gpt import GPTConfig, build, set_checkpointing

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from pytest_gputrain.reference.sft_data import Document

TEXT = Path(__file__).with_name("text.txt")
CONFIG = GPTConfig(depth=2, width=64, sequence_length=96)
BATCH_SIZE = 4
_ENDS = re.compile(r"\n|(?<=[.:;,|]) ")
_FEWEST = 32  # bytes of a document: below, there is no room for a question and an answer
_LEAST_PROMPT = 12
_SEED = 1234


@functools.cache
def documents() -> tuple[Document, ...]:
    """The clauses of the text, each a document: its first words ask, the rest answers."""
    import torch

    from pytest_gputrain.reference.sft_data import Document

    parts = [part.strip().encode() for part in _ENDS.split(TEXT.read_text(encoding="utf-8"))]
    return tuple(
        Document(torch.tensor(list(part)), max(_LEAST_PROMPT, part.find(b" ", _LEAST_PROMPT, _FEWEST) + 1))
        for part in parts
        if len(part) >= _FEWEST
    )


def batches(max_seq_len: int, pads_to_longest: bool) -> Iterator[dict[str, Tensor]]:
    """One epoch of this rank's part, shuffled alike on all ranks; no short batch is made of what is left."""
    import torch
    import torch.distributed as dist

    from pytest_gputrain.reference.sft_data import collate

    found = documents()
    ranks = dist.is_available() and dist.is_initialized()
    rank, world_size = (dist.get_rank(), dist.get_world_size()) if ranks else (0, 1)
    generator = torch.Generator().manual_seed(_SEED)
    order = torch.randperm(len(found), generator=generator).tolist()[rank::world_size]
    for start in range(0, len(order) - BATCH_SIZE + 1, BATCH_SIZE):
        drawn = [found[index] for index in order[start : start + BATCH_SIZE]]
        yield collate(drawn, max_seq_len, pads_to_longest=pads_to_longest)


def draw(max_seq_len: int, batch_size: int, device: torch.device | str) -> dict[str, Tensor]:
    """``inputs`` and ``targets``, (batch_size, max_seq_len) int64; -100 where a target does not count."""
    import torch

    from pytest_gputrain.reference.sft_data import collate

    found = documents()
    drawn = torch.randint(len(found), (batch_size,)).tolist()
    batch = collate([found[index] for index in drawn], max_seq_len)
    return {name: rows.to(device) for name, rows in batch.items()}


def loss(model: Any, batch: dict[str, Tensor]) -> Tensor:
    """Mean cross entropy over the tokens that count, a scalar."""
    import torch.nn.functional as F

    logits = model(batch["inputs"])
    return F.cross_entropy(logits.flatten(0, 1).float(), batch["targets"].flatten())


def num_targets(batch: dict[str, Tensor]) -> int:
    """The tokens that count."""
    from pytest_gputrain.reference import sft_data

    return sft_data.num_targets(batch)


def sft_case(*, pads_to_longest: bool = False, **config: Any) -> TrainingCase:
    """Fields of `GPTConfig` by keyword; ``sequence_length`` is the length to which documents are padded."""
    chosen = replace(CONFIG, **config)
    length = chosen.sequence_length
    return TrainingCase(
        name="sft-longest" if pads_to_longest else "sft",
        model=partial(build, chosen),
        batch=partial(draw, length),
        batches=partial(batches, length, pads_to_longest),
        loss=loss,
        loss_reduction="token_mean",
        num_targets=num_targets,
        set_checkpointing=set_checkpointing,
    )


case = sft_case()
case_longest = sft_case(pads_to_longest=True)
