"""``gputrain find-batch`` for a GPU that is not here: the largest batch size that is predicted to fit."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from pytest_gputrain.cli.find_batch_job import Events, Request

if TYPE_CHECKING:
    from pytest_gputrain.case import TrainingCase
    from pytest_gputrain.memory.prediction import MaximumPrediction


# The optimizer's step is told of where it comes near what the peak is; elsewhere the line is the whole story.
FLOOR = 0.9


class CannotPredict(Exception):
    """Fake tensors cannot run the case; one line that says why, and the way out."""


def predicted(request: Request, case: TrainingCase) -> dict[str, Any]:
    from pytest_gputrain.memory.fake_seam import PredictionUnavailable
    from pytest_gputrain.memory.fake_step import PredictionError
    from pytest_gputrain.memory.predict import predict_maximum

    assert request.capacity is not None, "a prediction has a capacity"
    began = time.monotonic()
    limit = int(request.capacity * request.margin)
    Events(request.progress).write(doing="predicting by fake tensors", limit=limit)
    share, sizes = request.share, request.sizes()

    def ask(minimum: int, maximum: int) -> MaximumPrediction:
        return predict_maximum(
            case,
            limit,
            minimum=minimum,
            maximum=maximum,
            device="cuda" if request.device == "cuda" else "cpu",
            checkpointing=request.checkpointing,
            # Whoever accumulates has gradients during forward; two steps show it as well as many.
            accumulation_steps=1 if share is None or minimum == share else 2,
            world_size=request.world_size,
            compiled=request.compiled,
        )

    try:
        found = _largest(ask, sizes, share)
    except (PredictionError, PredictionUnavailable) as error:
        raise CannotPredict(f"cannot be predicted: {error}; --measure runs real steps") from error
    return _answer(request, case, found, limit, time.monotonic() - began)


def _answer(
    request: Request, case: TrainingCase, found: MaximumPrediction, limit: int, seconds: float
) -> dict[str, Any]:
    """The fields of an Answer."""
    from pytest_gputrain.memory.prediction import ERROR_BAR_ORIGIN

    prediction = found.prediction
    overhead = prediction.overhead_bytes
    ladder = [(prediction.batch_size, float(prediction.peak_bytes + overhead))]
    if found.beyond is not None:
        ladder.append((found.size + 1, float(found.beyond + overhead)))
    law, bar = prediction.law, prediction.error_bar
    return {
        "method": "predicted",
        "device": "a GPU" if request.device == "cuda" else "a CPU",
        "given": True,
        "capacity": request.capacity,
        "limit": limit,
        "size": found.size,
        "at_maximum": found.size == request.sizes()[-1],
        "ladder": tuple(ladder),
        "law": (law.fixed_bytes + overhead, law.bytes_per_sample),
        "by_category": dict(prediction.by_category),
        "overhead_bytes": overhead,
        "seconds": seconds,
        "law_floor": law.floor_bytes + overhead if law.floor_bytes > FLOOR * prediction.peak_bytes else 0.0,
        "error_bar": (bar.low, bar.high),
        "error_bar_origin": f"{bar.of}; {ERROR_BAR_ORIGIN}",
        "warnings": () if law.holds else (f"memory does not grow in a straight line: {law}",),
        "notes": tuple(prediction.notes),
        "beside": estimated(case, prediction.batch_size, request),
    }


def estimated(case: TrainingCase, batch_size: int, request: Request) -> dict[str, int]:
    """{"estimate": bytes by the formula}, empty where it does not know the model."""
    from pytest_gputrain.memory.estimate import estimate_memory
    from pytest_gputrain.memory.fake_seam import PredictionUnavailable
    from pytest_gputrain.memory.fake_step import PredictionError

    try:
        estimate = estimate_memory(case, batch_size, checkpointing=request.checkpointing)
    except (PredictionError, PredictionUnavailable):
        return {}
    return {} if estimate.activations is None else {"estimate": estimate.total_bytes}


def _largest(
    ask: Callable[[int, int], MaximumPrediction], sizes: Sequence[int], share: int | None
) -> MaximumPrediction:
    """The prediction for the largest legal size that fits; for the smallest one where none does."""
    if share is not None and sizes[-1] == share:  # without accumulation
        whole = ask(share, share)
        if whole.size or len(sizes) == 1:
            return whole
        sizes = sizes[:-1]
    found = ask(sizes[0], sizes[-1])
    legal = max((size for size in sizes if size <= found.size), default=0)
    return found if legal == found.size else ask(legal, legal)
