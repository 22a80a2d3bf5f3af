"""A reference case on real text, so that there is something to learn: bytes of the package's own text."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pytest_gputrain.case import TrainingCase

BATCH_SIZE = 4


def with_text(case: TrainingCase) -> TrainingCase:
    """The case with ``batches`` that walk through the text once; for the reference GPT and OPT."""
    return replace(case, batches=partial(batches, case))


def batches(case: TrainingCase) -> Iterator[dict[str, Any]]:
    """Batches of the case's own shape and names, 4 samples each, of neighbouring windows."""
    import torch

    from pytest_gputrain.reference.train_data import text_tokens

    names = case.batch(BATCH_SIZE, torch.device("cpu"))
    length = next(iter(names.values())).shape[1]
    text = text_tokens()
    windows = text[: (len(text) - 1) // length * length].view(-1, length)
    following = text[1 : windows.numel() + 1].view(-1, length)
    for start in range(0, len(windows) - BATCH_SIZE + 1, BATCH_SIZE):
        tokens, after = windows[start : start + BATCH_SIZE], following[start : start + BATCH_SIZE]
        if "targets" in names:
            yield {"inputs": tokens.clone(), "targets": after.clone()}
        else:  # OPT shifts its labels itself
            yield {"input_ids": tokens.clone(), "labels": tokens.clone()}
