"""The work of ``gputrain find-batch``, in a process of its own.

A model that crashes the interpreter, hangs or fills the host's memory ends this process, and the command line
says so.

Everything comes and goes as plain values.
"""

from __future__ import annotations

import logging
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pytest_gputrain.case.loading import CaseError, load_case
from pytest_gputrain.cli.find_batch_job import Events, Request
from pytest_gputrain.cli.find_batch_predicted import CannotPredict, estimated, predicted

if TYPE_CHECKING:
    from pytest_gputrain.batch.discovered import Discovered
    from pytest_gputrain.batch.seed import Seed
    from pytest_gputrain.case import TrainingCase

_PACKAGE = str(Path(__file__).resolve().parents[1])


def work(request: Request) -> dict[str, Any]:
    """The fields of an Answer, or {"usage" or "failed": one line}. What a case raises is passed on."""
    try:
        case = _one_case(request.spec)
    except CaseError as error:
        return {"usage": str(error)}
    told = _Told()
    logger = logging.getLogger("pytest_gputrain.batch")
    logger.addHandler(told)
    try:
        found = predicted(request, case) if request.predict else _measured(request, case)
    except CannotPredict as error:
        return {"failed": str(error)}
    except ValueError as error:
        if _is_ours(error):  # what was asked, not what the case's code raised
            return {"usage": str(error)}
        raise
    finally:
        logger.removeHandler(told)
    own = [*_other_length(request, case), *told.lines]
    found["warnings"] = tuple(dict.fromkeys([*found["warnings"], *own]))
    return {"case": case.name, "margin": request.margin, "minimum": request.minimum, **found}


def _one_case(spec: str) -> TrainingCase:
    cases = load_case(spec)
    if len(cases) > 1:
        names = ", ".join(case.name for case in cases)
        raise CaseError(f"{spec} is {len(cases)} cases ({names}); name one of them")
    return cases[0]


def _other_length(request: Request, case: TrainingCase) -> Iterator[str]:
    """A warning where sequences of the case are not as long as those that the answer is meant for.

    Sequences: integers of shape (batch, tokens), one more of them where the case shifts them itself.
    """
    from pytest_gputrain.case import pytree

    if request.block_size is None:
        return
    try:
        batch = case.batch(request.minimum, "cpu" if request.predict else request.device)
    except Exception:  # drawn without complaint until now: nothing to warn of
        return
    whole = [one for one in pytree.tensors(batch) if one.dim() == 2 and not one.is_floating_point()]
    length = max((one.shape[1] for one in whole), default=None)
    if length not in (None, request.block_size, request.block_size + 1):
        yield (
            f"the sequences of {case.name} are {length} tokens long, those of --block-size "
            f"{request.block_size}, so another batch size may fit"
        )


def _measured(request: Request, case: TrainingCase) -> dict[str, Any]:
    from pytest_gputrain.batch.cache import BatchCache
    from pytest_gputrain.batch.discovery import find_batch
    from pytest_gputrain.batch.seed import Seed

    events = Events(request.progress)
    limit = None if request.capacity is None else int(request.capacity * request.margin)
    events.write(doing="predicting, then running the first probe", limit=limit)
    seed = Seed(
        case,
        "cuda" if request.device == "cuda" else "cpu",
        checkpointing=request.checkpointing,
        accumulation_steps=1 if request.share in (None, 1) else 2,
        world_size=request.world_size,
    )

    def on_probe(size: int, peak: float | None, seconds: float) -> None:
        events.write(size=size, peak=peak, seconds=seconds)
        events.write(doing="running the next probe")

    found = find_batch(
        case,
        device=request.device,
        capacity=request.capacity,
        safety_margin=request.margin,
        min_batch_size=request.minimum,
        max_batch_size=request.maximum,
        multiple_of=request.multiple_of,
        global_batch_size=request.global_batch,
        ragged=request.ragged,
        world_size=request.world_size,
        eval_batch_factor=request.eval_batch_factor,
        iterations=request.iterations,
        compiled=request.compiled,
        checkpointing=request.checkpointing,
        strategy=request.strategy,
        cache=None if request.cache is None else BatchCache(Path(request.cache)),
        on_probe=on_probe,
        predicted=seed,
    )
    return _answer(request, case, found, seed)


def _answer(request: Request, case: TrainingCase, found: Discovered, seed: Seed) -> dict[str, Any]:
    """The fields of an Answer; beside what was measured, what formula and prediction say."""
    beside = {} if found.source == "cache" else estimated(case, found.size or request.minimum, request)
    if found.source != "cache" and (law := seed.law()) is not None:
        beside["predicted"] = round(law(found.size or request.minimum))
    return {
        "method": "measured",
        "device": _device_name(request.device),
        "given": request.capacity is not None,
        "capacity": found.capacity,
        "limit": found.limit,
        "size": found.size,
        "at_maximum": found.size == request.sizes()[-1],
        "ladder": (*found.known.items(), *found.search.probes),
        "law": found.law,
        "by_category": dict(found.by_category),
        "seconds": found.seconds,
        "source": found.source,
        "warnings": tuple(found.warnings),
        "notes": (found.data_parallel,) if found.data_parallel else (),
        "failure": found.failure,
        "beside": beside,
    }


def _device_name(device: str) -> str:
    if device == "cpu":
        return "cpu"
    import torch

    return torch.cuda.get_device_name(device)


def _is_ours(error: BaseException) -> bool:
    frames = traceback.extract_tb(error.__traceback__)
    return bool(frames) and frames[-1].filename.startswith(_PACKAGE)


class _Told(logging.Handler):
    """Keeps warnings for the user: this process's own output is shown only where it fails."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())
