"""What ``gputrain find-batch`` was asked: measure or predict, where, and among which batch sizes.

Everything that is wrong without looking at the case is told here, before a process is started.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from pytest_gputrain.cli.arguments import UsageError
from pytest_gputrain.values import format_size

if TYPE_CHECKING:
    from pytest_gputrain.cli.find_batch_job import Request

# On a CPU a probe takes seconds, and nobody trains with larger batches there.
MOST_ON_CPU, MOST = 128, 4096


class Place(NamedTuple):
    """Where the answer is found, and how: ``told`` says so."""

    predict: bool
    device: str
    capacity: int | None
    told: str


def chosen_place(options: argparse.Namespace) -> Place:
    """Decide between measuring and predicting. Raises UsageError."""
    from pytest_gputrain.devices.sharing import lacking

    capacity = _capacity(options.capacity)
    if options.predict and capacity is None:
        raise UsageError('--predict needs the memory to predict for; give --capacity, such as "80GB"')
    gpu = _gpu()
    if options.predict or (capacity and _is_elsewhere(options, capacity, gpu)):
        assert capacity is not None
        device = options.device or "cuda"
        on = "a GPU" if device == "cuda" else "a CPU"
        how = "; --measure runs real steps" if not options.predict else ""
        told = f"predicting for {on} with {format_size(capacity)}, by fake tensors{how}"
        return Place(True, device, capacity, told)
    device = options.device or ("cuda" if gpu is not None else "cpu")
    if device == "cuda" and (lack := lacking(1, share_gpu=False)):
        raise UsageError(
            f"--device cuda {lack}; give --device cpu, or --predict and --capacity for a GPU that is not here"
        )
    name = gpu.name if device == "cuda" and gpu is not None else "the CPU"
    within = f", within {format_size(capacity)}" if capacity else ""
    return Place(False, device, capacity, f"real training steps on {name}{within}")


def _is_elsewhere(options: argparse.Namespace, capacity: int, gpu: Any) -> bool:
    """Whether that much memory is meant to be another machine's."""
    if options.measure or options.device:
        return False
    return gpu is None or gpu.memory_bytes < capacity


def _gpu() -> Any:
    """The first GPU of this process; None where there is none, or it is a pretended one."""
    from pytest_gputrain.devices import discover, visible_gpus
    from pytest_gputrain.devices.inventory import FAKE_VARIABLE

    inventory = discover()
    visible = () if inventory.source == FAKE_VARIABLE else visible_gpus(inventory, os.environ)
    return visible[0] if visible else None


def _capacity(text: str | None) -> int | None:
    from pytest_gputrain.values import capacity_in_bytes

    try:
        return None if text is None else capacity_in_bytes(text)
    except ValueError as error:
        raise UsageError(f"--capacity: {str(error).removeprefix('capacity: ')}") from None


def checked_request(options: argparse.Namespace, place: Place, progress: Path) -> Request:
    """Everything checked that can be without the case. Raises UsageError."""
    from pytest_gputrain.batch.cache_folder import cache_folder
    from pytest_gputrain.cli.find_batch_job import Request

    spec = options.spec or os.environ.get("GPUTRAIN_CASE", "").strip()
    _checked_spec(spec)
    on_cpu = place.device == "cpu" and not place.predict
    maximum = options.max or max(options.min, MOST_ON_CPU if on_cpu else MOST)
    cached = not (place.predict or options.no_cache)
    request = Request(
        spec=spec,
        predict=place.predict,
        device=place.device,
        capacity=place.capacity,
        margin=options.margin,
        minimum=options.min,
        maximum=maximum,
        multiple_of=options.multiple_of,
        world_size=options.world_size,
        global_batch=options.global_batch,
        strategy=options.strategy,
        eval_batch_factor=options.eval_factor,
        iterations=options.iterations,
        compiled=options.compiled,
        checkpointing=options.checkpointing,
        cache=str(cache_folder(options.cache_dir)) if cached else None,
        progress=str(progress),
        block_size=options.block_size,
    )
    return _checked_sizes(request)


def _checked_spec(spec: str) -> None:
    from pytest_gputrain.case.loading import CaseError, split_spec

    if not spec:
        raise UsageError("no case given; give MODULE:ATTR, such as my_project.cases:gpt")
    try:
        split_spec(spec, "case")
    except CaseError as error:
        raise UsageError(str(error)) from None


def _checked_sizes(request: Request) -> Request:
    """The request, once there is a batch size that is legal at all. Raises UsageError."""
    from pytest_gputrain.batch.bounds import per_rank

    if request.minimum > request.maximum:
        raise UsageError(f"--min {request.minimum} is above --max {request.maximum}; give 1 <= MIN <= MAX")
    try:
        per_rank(request.global_batch, request.world_size)
        request.sizes()
    except ValueError as error:
        raise UsageError(str(error)) from None
    return request
