"""``find_batch``: the largest batch size at which a case really trains within the memory that there is.

Each size is tried by a probe (``probe.py``), sizes are chosen by ``search.py``, and what was measured before
comes from ``cache.py``. Runs in the process that calls it, on this rank. Imports no torch at the top.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from pytest_gputrain.batch import bounds
from pytest_gputrain.batch.cached_search import Found, Measures, search_through
from pytest_gputrain.batch.discovered import Discovered, OnProbe, line_through, not_a_case
from pytest_gputrain.batch.ladder import legal_sizes, whole
from pytest_gputrain.batch.search import SearchResult, find_maximum
from pytest_gputrain.batch.seed import Seed, wanted
from pytest_gputrain.case import TrainingCase
from pytest_gputrain.values import capacity_in_bytes, format_size

if TYPE_CHECKING:
    import torch

    from pytest_gputrain.batch.cache import BatchCache
    from pytest_gputrain.batch.cached_search import Known, Probe
    from pytest_gputrain.batch.probe import TrainingProbe
    from pytest_gputrain.batch.probe_target import Memory, Target

_NEEDS_TWO = "Expected more than 1 value per channel when training"

__all__ = ["Discovered", "find_batch"]


def find_batch(
    case: TrainingCase,
    *,
    device: str | torch.device = "cpu",
    capacity: int | str | None = None,
    safety_margin: float = 0.85,
    min_batch_size: int = 1,
    max_batch_size: int = 128,
    multiple_of: int = 1,
    global_batch_size: int | None = None,
    ragged: bool = False,
    world_size: int = 1,
    eval_batch_factor: float = 1,
    iterations: int = 3,
    compiled: bool = False,
    checkpointing: bool = False,
    strategy: str = "model",
    cache: BatchCache | None = None,
    cache_key_components: object = None,
    on_probe: OnProbe | None = None,
    predicted: Callable[[int], float] | None = None,
    predict_first: bool | None = None,
    model: torch.nn.Module | None = None,
    optimizer: torch.optim.Optimizer | None = None,
    at_most: int | None = None,
    on_start: Callable[[], None] | None = None,
) -> Discovered:
    """Find the largest device batch size whose training stays within ``capacity * safety_margin``.

    capacity: bytes or "80GB"; None is what this process can have of the device. With ``global_batch_size``
    the answer times ``world_size`` divides it, and where that leaves accumulation the probed step accumulates
    (then gradients are there during forward); without it a step is one batch. ``ragged``: a step's last
    micro-batch may be smaller, so the answer need not divide. ``world_size`` above 1 counts the buckets of
    data parallel. eval_batch_factor: evaluation's batch by training's, 0 for none.
    ``compiled``, ``checkpointing``: as the case does them. ``model`` and ``optimizer`` are probed in place
    and left as they were; without them the case makes them. at_most: bytes, a bound on the capacity (other
    ranks have less). predicted(batch size): a peak that says where to look first; ``predict_first`` gets it
    from fake tensors (None: on a GPU), and does without where those cannot run the case.
    on_probe(batch size, peak or None, seconds). on_start(): the cache has no answer.

    Raises ``ValueError`` with one line for what cannot be asked; what the case's functions raise is passed
    on.
    """
    began = time.monotonic()
    if not isinstance(case, TrainingCase):
        raise ValueError(not_a_case(case))
    share = bounds.per_rank(global_batch_size, whole("world_size", world_size))
    least, most = bounds.checked_range(min_batch_size, max_batch_size)
    divides = share
    if ragged and share is not None:
        most, divides = min(most, share), None
    sizes = legal_sizes(least, most, multiple_of, divides)
    margin = bounds.checked_margin(safety_margin)
    given = None if capacity is None else capacity_in_bytes(capacity)
    bounds.checked_steps(iterations)
    factor = bounds.checked_factor(eval_batch_factor)
    if checkpointing and case.set_checkpointing is None:
        raise ValueError(f"checkpointing=True: case {case.name!r} has no set_checkpointing; give it one")

    from pytest_gputrain.batch.probe import Conditions
    from pytest_gputrain.batch.probe_globals import preserved
    from pytest_gputrain.batch.probe_target import memory_here, micro_batches_of, target_of

    conditions = Conditions(micro_batches_of(share), iterations, factor, compiled, checkpointing)
    with preserved():
        memory = memory_here(device, model)
        target = target_of(case, model, optimizer, memory.device, conditions, world_size)
        if wanted(predict_first, predicted, memory.device.type, len(sizes)):
            predicted = Seed.of(target, share, world_size)
        measures = _measures(memory, given, at_most, margin, target.reserved)
        search = _Search(least, most, multiple_of, divides, measures.limit, strategy, predicted, on_start)
        with _Runner(target, measures.limit, on_probe) as runner:
            if cache is None:
                found = Found(search(runner, {}), {}, from_cache=False)
            else:
                key = target.cache_key(world_size, {"share": share}, cache_key_components)
                found = search_through(cache, key, search, runner, measures)
    return _discovered(found, runner, measures, time.monotonic() - began)


def _measures(
    memory: Memory, given: int | None, at_most: int | None, margin: float, reserved: int
) -> Measures:
    capacity = memory.free if given is None else given
    if at_most is not None:
        capacity = min(capacity, at_most)
    limit = max(1, bounds.limit_in_bytes(capacity, margin) - reserved)
    on_gpu = memory.device.type == "cuda"
    return Measures(limit, capacity, memory.free, on_gpu, accounted=given is not None and not on_gpu)


@dataclass(frozen=True)
class _Search:
    """``search(probe, known)``: ``find_maximum`` with all that stays the same."""

    least: int
    most: int
    multiple_of: int
    divides: int | None
    limit: int
    strategy: str
    predicted: Callable[[int], float] | None
    on_start: Callable[[], None] | None

    def __call__(self, probe: Probe, known: Known) -> SearchResult:
        if self.on_start is not None and isinstance(probe, _Runner):
            self.on_start()
        try:
            return self._from(self.least, probe, known)
        except ValueError as error:
            # BatchNorm over (batch, channels) cannot train on one sample. That is no bug, and not of memory.
            if self.least > 1 or _NEEDS_TWO not in str(error):
                raise
        result = self._from(2, probe, known)
        said = "batch size 1 cannot be trained (BatchNorm needs more than one value per channel)"
        return replace(result, warning=f"{said}; {result.warning}" if result.warning else said)

    def _from(self, least: int, probe: Probe, known: Known) -> SearchResult:
        return find_maximum(
            probe,
            minimum=least,
            maximum=self.most,
            capacity=self.limit,
            multiple_of=self.multiple_of,
            divides=self.divides,
            strategy=self.strategy,
            predicted=self.predicted,
            known=known,
            show=lambda peak: format_size(int(peak)),
        )


class _Runner:
    """Runs probes; the first one keeps the model's state: an answer from a cache costs no copy of it."""

    def __init__(self, target: Target, limit: int, on_probe: OnProbe | None) -> None:
        self.target = target
        self.probe: TrainingProbe | None = None
        self._limit = limit
        self._on_probe = on_probe
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> _Runner:
        return self

    def __exit__(self, *exc: object) -> None:
        self._stack.close()

    def __call__(self, batch_size: int) -> float | None:
        began = time.monotonic()
        if self.probe is None:
            self.probe = self._stack.enter_context(self.target.probe(self._limit))
        peak = self.probe(batch_size)
        if self._on_probe is not None:
            self._on_probe(batch_size, peak, time.monotonic() - began)
        return peak


def _discovered(found: Found, runner: _Runner, measures: Measures, seconds: float) -> Discovered:
    result = found.result
    observed = runner.probe.observed if runner.probe is not None else {}
    told = observed.get(result.size or min(observed, default=0))
    warnings = runner.target.doubts()
    warnings += [result.warning] if result.size and result.warning else []
    if told and result.size:
        warnings += told.notes(result.size, measures.limit)
    peaks = {**found.known, **dict(result.probes)}
    return Discovered(
        size=result.size,
        search=result,
        capacity=measures.capacity,
        limit=measures.limit,
        law=line_through([(size, peak) for size, peak in peaks.items() if peak is not None]),
        seconds=seconds,
        source="cache" if found.from_cache else "discovered",
        by_category=told.by_category if told else {},
        warnings=tuple(warnings),
        data_parallel=runner.target.data_parallel,
        known=found.known,
        cache_key=found.key,
        failure="" if result.size or told is None else told.failure,
    )
