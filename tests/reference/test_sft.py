"""Documents of unequal lengths: how they are masked, padded, cut, filled up, and shared by ranks."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from pytest_gputrain import launch
from pytest_gputrain.reference import sft, sft_data
from pytest_gputrain.reference.sft_data import MASKED, PADDING, Document


def document(length: int, num_prompt: int) -> Document:
    return Document(torch.arange(1, length + 1), num_prompt)


def test_a_document_of_one_token_more_fills_the_columns_of_the_inputs() -> None:
    batch = sft_data.collate([document(5, 2), document(3, 1), document(9, 3)], 4)
    assert batch["inputs"].tolist() == [[1, 2, 3, 4], [1, 2, PADDING, PADDING], [1, 2, 3, 4]]
    assert batch["targets"].tolist() == [
        [MASKED, 3, 4, 5],
        [2, 3, MASKED, MASKED],
        [MASKED, MASKED, 4, 5],
    ]
    assert sft_data.num_targets(batch) == 7


def test_the_longest_may_decide_below_the_length() -> None:
    documents = [document(5, 2), document(3, 1)]
    shapes = [sft_data.collate(documents, length, pads_to_longest=True)["inputs"].shape for length in (9, 3)]
    assert shapes == [(2, 4), (2, 3)]


def test_rows_that_fill_a_batch_up_change_no_loss() -> None:
    batch = sft_data.collate([document(5, 2), document(3, 1)], 4)
    more = sft_data.filled(batch, 5)
    assert more["inputs"].shape == more["targets"].shape == (5, 4)
    assert sft_data.num_targets(more) == sft_data.num_targets(batch)
    assert sft_data.filled(batch, 2) is batch
    model = sft.case.model()
    torch.nn.init.normal_(model.head.weight)
    assert sft.loss(model, more).item() == pytest.approx(sft.loss(model, batch).item(), rel=1e-6)


def test_the_case_pads_to_one_shape_and_its_twin_to_many() -> None:
    fixed = list(sft.case.batches())
    assert {tuple(batch["inputs"].shape) for batch in fixed} == {(4, 96)}
    assert all((batch["targets"] != MASKED).any(dim=1).all() for batch in fixed)
    assert any((batch["inputs"] == PADDING).any() for batch in fixed)
    assert len({tuple(batch["inputs"].shape) for batch in sft.case_longest.batches()}) > 20
    assert sft.case.batch(3, "cpu")["inputs"].shape == (3, 96)


@pytest.mark.skipif("sys.platform != 'linux'", reason="launching ranks needs Linux")
def test_ranks_share_the_documents() -> None:
    def seen() -> set[tuple[int, ...]]:
        return {tuple(row.tolist()) for batch in sft.case.batches() for row in batch["inputs"]}

    first, second = launch(seen, world_size=2).values
    assert len(first & second) < len(first) // 10  # a few lines of the text are there twice


def test_the_case_imports_no_torch() -> None:
    code = "import pytest_gputrain.reference.sft, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=60).returncode == 0
