"""What varies in a stream's shapes, in words, and the fixed length that would do."""

from __future__ import annotations

import pytest
import torch

from pytest_gputrain.case import TrainingCase
from pytest_gputrain.checks.batch_columns import Seen, Shapes, advice, fixed_length, in_words, variations
from pytest_gputrain.checks.useful_tokens import count
from tests.planted.plant import case


def tokens(*lengths: int, rows: int = 4, ended: bool = False) -> Seen:
    return Seen([(("['x']", (rows, n), "int64"), ("['y']", (rows, n), "int64")) for n in lengths], ended)


def told(seen: Seen) -> list[tuple[str, str]]:
    return [(in_words(one, seen), advice(one, seen)) for one in variations(seen)]


def test_one_shape_varies_in_nothing() -> None:
    assert told(tokens(16, 16, 16)) == []


def test_lengths_get_the_multiple_of_eight_that_holds_them_and_its_price() -> None:
    assert told(tokens(37, 61, 37, 50)) == [
        (
            "['x'], ['y'] are (4, 37) in batch 0 and (4, 61) in batch 1",
            "pad to a fixed length instead of the longest of each batch; 64 would do, 38% more tokens",
        )
    ]


def test_inputs_have_2048_columns_and_not_2047() -> None:
    (_, way_out), *_ = told(tokens(2048, 2048, 2047))
    assert way_out.endswith("; 2048 would do, not 2047, 0% more tokens")


@pytest.mark.parametrize(
    ("longest", "length"), [(61, 64), (64, 64), (2047, 2048), (2048, 2048), (2049, 2049), (5, 5)]
)
def test_fixed_length(longest: int, length: int) -> None:
    assert fixed_length(longest) == length


def test_a_short_last_batch_is_told_from_rows_that_vary() -> None:
    rows: list[Shapes] = [(("x", (n, 16), "float32"),) for n in (4, 4, 3)]
    ((words, way_out),) = told(Seen(rows, ended=True))
    assert words == "x is (4, 16) in batch 0 and (3, 16) in batch 2, the last"
    assert way_out.startswith("the last batch of the data is short: drop_last=True, or fill it up")
    ((_, way_out),) = told(Seen(rows, ended=False))
    assert way_out == "give every batch the same number of samples, or compile with dynamic=True"


def test_another_type_and_a_missing_tensor() -> None:
    full = (("x", (4, 16), "float32"), ("mask", (4, 16), "bool"))
    seen = Seen([full, full, (("x", (4, 16), "float64"),)], ended=False)
    assert told(seen) == [
        (
            "x is float32 in batch 0 and float64 in batch 2",
            "convert to one type where batches are made: float32 in every batch",
        ),
        (
            "mask is (4, 16) bool in batch 0 and not there in batch 2",
            "give every batch the same tensors (a mask of ones where nothing is masked)",
        ),
    ]


def test_the_usual_shape_is_that_of_most_batches() -> None:
    seen = tokens(60, 64, 64)
    assert in_words(variations(seen)[0], seen).startswith("['x'], ['y'] are (4, 60) in batch 0 and (4, 64)")


LABELS = torch.tensor([[1, 2, -100], [3, -100, -100]])
MASK = torch.tensor([[1, 1, 0], [1, 0, 0]])


@pytest.mark.parametrize(
    ("batch", "found"),
    [
        ({"x": torch.zeros(2, 3), "y": torch.zeros(2)}, None),
        ({"tokens": MASK, "labels": LABELS}, (3, 6)),
        ({"tokens": MASK + 5, "attention_mask": MASK}, (3, 6)),
        ({"tokens": MASK + 5, "mask": MASK.bool()}, (3, 6)),
        ({"tokens": MASK + 5, "mask": torch.tensor([[0.0, -1e9, 0], [0, 0, 0]])}, None),
    ],
)
def test_useful_tokens_by_what_the_batch_says(batch: object, found: object) -> None:
    assert count(case("tiny"), batch) == found


def test_useful_tokens_by_the_cases_own_count() -> None:
    counting: TrainingCase = case("tiny", num_targets=lambda batch: 5)
    assert count(counting, {"tokens": MASK}) == (5, 6)
