"""A search that begins with a prediction: fewer probes, the same answer, and nothing breaks without one."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn

from pytest_gputrain import find_batch
from pytest_gputrain.batch.cache import BatchCache
from pytest_gputrain.batch.seed import wanted
from pytest_gputrain.reference.gpt import gpt_case
from tests.batch.models import Restless, case_of, mlp, rows, square


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


CASE = gpt_case(1, width=32, sequence_length=16)


def test_a_prediction_saves_probes(tmp_path: Any) -> None:
    alone = find_batch(CASE, capacity="6MB", max_batch_size=256)
    cache = BatchCache(tmp_path)
    seeded = find_batch(CASE, capacity="6MB", max_batch_size=256, predict_first=True, cache=cache)
    assert seeded.size == alone.size
    assert len(seeded.search.probes) == 2 < len(alone.search.probes)
    assert (
        find_batch(CASE, capacity="6MB", max_batch_size=256, predict_first=True, cache=cache).source
        == "cache"
    )


def through_numpy(model: Any, batch: torch.Tensor) -> torch.Tensor:
    return square(model, batch) * float(model(batch).detach().numpy().mean() ** 2 + 1)


def test_what_cannot_be_predicted_is_searched_without(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG, logger="pytest_gputrain.batch")
    case = case_of(mlp, batch=lambda n, d: rows(n, d, 64), loss=through_numpy)
    found = find_batch(case, capacity="1MB", predict_first=True)
    assert found.search == find_batch(case, capacity="1MB").search
    assert "no prediction to begin with: case 'planted' cannot be predicted: " in caplog.text


def test_the_users_model_is_as_it_was() -> None:
    model = Restless()
    before = [*vars(model).items()]
    parameters = [(parameter, parameter.detach().clone()) for parameter in model.parameters()]
    find_batch(case_of(Restless), model=model, capacity="1MB", max_batch_size=16, predict_first=True)
    assert [name for name, _ in before] == [*vars(model)]
    assert (model.calls, model.seen) == (0, [])
    assert torch.equal(model.average, torch.zeros(3))
    for now, (parameter, value) in zip(model.parameters(), parameters, strict=True):
        assert now is parameter and torch.equal(now, value) and type(now) is nn.Parameter


@pytest.mark.parametrize(
    ("asked", "device", "sizes", "answer"),
    [
        (None, "cuda", 9, True),
        (None, "cpu", 9, False),
        (True, "cpu", 9, True),
        (False, "cuda", 9, False),
        (True, "cuda", 2, False),
    ],
)
def test_where_a_search_begins_with_a_prediction(
    asked: bool | None, device: str, sizes: int, answer: bool
) -> None:
    assert wanted(asked, None, device, sizes) is answer
    assert not wanted(True, float, "cuda", 9)
