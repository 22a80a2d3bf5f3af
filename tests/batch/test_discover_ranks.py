"""Ranks that discover together: the same answer on all of them, or an exception on all of them."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from pytest_gputrain import discover_batch_size, launch
from pytest_gputrain.batch import probe_target
from tests.batch.models import Language

Told = tuple[Any, list[str]]


class Broken(Language):
    def forward(self, x: Any, y: Any) -> Any:
        raise TypeError("a bug")


def _unreadable(device: Any) -> tuple[int, int]:
    raise OSError("no meminfo")


def _four_megabytes(device: Any) -> tuple[int, int]:
    """Free beside a `Language`, whose own memory counts as its rank's."""
    free = 4 * 10**6 - probe_target.num_bytes([*Language().parameters()])
    return int(free / probe_target.HOST_SHARE), 2**40


def _on_a_rank(folder: str) -> dict[str, Told]:
    """What each discovery came to on this rank, with its log lines."""
    torch.set_num_threads(1)
    rank, told = dist.get_rank(), dict[str, Told]()
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    log = logging.getLogger("pytest_gputrain.batch")
    log.addHandler(handler)
    log.setLevel(logging.INFO)

    def discover(name: str, model: Language, length: int = 32, **asked: Any) -> None:
        del lines[:]
        found: Any
        try:
            found = discover_batch_size(
                model, length, "cpu", ddp_rank=rank, ddp_world_size=2, **{"capacity": "2MB", **asked}
            )
        except Exception as error:
            found = f"{type(error).__name__}: {str(error).splitlines()[0]}"
        told[name] = found, [*lines]
        # The group is the real one again, and the ranks still count their groups alike.
        total = torch.ones(1)
        dist.all_reduce(total, group=dist.new_group([0, 1]))
        assert total == 2

    discover("alike", Language())
    discover("less on rank 1", Language(), capacity="1MB" if rank else "2MB")
    for name in ("larger on rank 1", "the same, cached"):
        discover(name, Language(copies=8 if rank else 1), use_cache=True, cache_dir=folder)
    discover("wrapped", torch.nn.parallel.DistributedDataParallel(Language()))  # type: ignore[arg-type]
    discover("bug on rank 0", Language() if rank else Broken())
    discover("bug on rank 1", Broken() if rank else Language())
    discover("bad input on rank 1", Language(), -1 if rank else 32)
    setattr(probe_target, "memory_of", _four_megabytes)  # noqa: B010
    discover("one memory", Language(), capacity=None)
    if rank:
        setattr(probe_target, "memory_of", _unreadable)  # noqa: B010  # mypy knows no such name there
    discover("unreadable on rank 1", Language(), capacity=None)
    return told


def test_ranks_agree_or_all_fail(tmp_path: Path) -> None:
    first, second = launch(_on_a_rank, str(tmp_path), world_size=2, timeout=120).values

    alike, lines = first["alike"]
    assert lines == ["Running auto-discovery on rank 0", f"Auto-discovery found device_batch_size={alike}"]
    assert second["alike"] == (alike, [f"Received batch size from rank 0: {alike}"])

    assert first["less on rank 1"][0] == second["less on rank 1"][0] < 0.6 * alike
    assert first["wrapped"][0] == second["wrapped"][0] == alike

    # No capacity is given: both take from one host, and each may have half of it, 2 MB.
    assert first["one memory"][0] == second["one memory"][0] == alike

    smaller, lines = first["larger on rank 1"]
    assert second["larger on rank 1"][0] == smaller < alike
    assert lines[1] == f"batch size {alike} does not fit on rank 1, where {smaller} does: all ranks take that"
    assert lines[2] == f"Auto-discovery found device_batch_size={smaller}"
    assert first["the same, cached"] == (smaller, [f"Cache hit! Using cached batch size {smaller}"])
    assert second["the same, cached"] == (smaller, [f"Received batch size from rank 0: {smaller}"])

    failed = "RankFailed: rank {} failed during batch-size discovery: {}"
    assert first["bug on rank 0"][0] == second["bug on rank 1"][0] == "TypeError: a bug"
    assert second["bug on rank 0"][0].startswith(failed.format(0, "TypeError: a bug (at "))
    assert first["bug on rank 1"][0].startswith(failed.format(1, "TypeError: a bug (at "))
    legal = "ValueError: max_seq_len is -1; legal is a whole number of 1 or more"
    assert (first["bad input on rank 1"][0], second["bad input on rank 1"][0]) == (
        failed.format(1, legal),
        legal,
    )

    assert first["unreadable on rank 1"][0] == second["unreadable on rank 1"][0] == 1
    assert first["unreadable on rank 1"][1][-1].endswith("falling back to device_batch_size=1")
