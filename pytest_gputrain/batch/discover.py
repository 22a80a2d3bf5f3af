"""``discover_batch_size``: one call in a training script, on one rank or on all of them.

All ranks take the least memory that any of them has; rank 0 searches within it, the others confirm its answer
by a probe each, and where it does not fit on all of them, they take the largest that does. Imports no torch
at the top.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pytest_gputrain.batch import bounds
from pytest_gputrain.batch.agreement import DiscoveryFailed, RankFailed, ranks_of
from pytest_gputrain.batch.discovered import not_a_case
from pytest_gputrain.batch.joint_discovery import JointDiscovery
from pytest_gputrain.batch.ladder import legal_sizes
from pytest_gputrain.batch.language import language_case
from pytest_gputrain.batch.search import checked_strategy
from pytest_gputrain.case import TrainingCase
from pytest_gputrain.values import capacity_in_bytes

if TYPE_CHECKING:
    import torch

    from pytest_gputrain.batch.cache import BatchCache

log = logging.getLogger("pytest_gputrain.batch")


def discover_batch_size(
    model: torch.nn.Module | None,
    max_seq_len: int | None,
    device: torch.device | str,
    safety_margin: float = 0.85,
    min_batch_size: int = 1,
    max_batch_size: int = 128,
    ddp_rank: int = 0,
    ddp_world_size: int = 1,
    use_cache: bool = False,
    cache_key_components: object = None,
    *,
    case: TrainingCase | None = None,
    global_batch_size: int | None = None,
    strategy: str = "model",
    override: int | None = None,
    capacity: int | str | None = None,
    eval_batch_factor: float = 1,
    optimizer: torch.optim.Optimizer | None = None,
    vocab_size: int | None = None,
    cache_dir: str | Path | None = None,
    fallback: int | None = None,
    compiled: bool = False,
) -> int:
    """Return the largest device batch size at which ``model`` trains within ``safety_margin`` of the memory.

    The model is called as ``model(x, y)``, both (batch, max_seq_len) int64, and returns its loss; for any
    other give ``case`` (then ``max_seq_len`` counts for nothing, and ``model`` may be None: the case makes
    one). It is really trained, in place, and left bit by bit as it was. With ``ddp_world_size`` above 1 every
    rank has to call this; all get the same answer, or all an exception. ``global_batch_size``: the samples of
    an optimizer step on all ranks together, which the answer times the world size then divides; a loop that
    accumulates should give it. ``override`` is returned at once. ``capacity``: bytes or "80GB", instead of
    what the device has. ``cache_dir``: default ``GPUTRAIN_CACHE_DIR`` or the user's cache folder.
    ``compiled``: it is probed compiled, as the case does it.

    When discovery itself fails (memory cannot be read, say) it warns and returns ``fallback``, by default the
    smallest legal size. Raises ``ValueError`` with one line for what cannot be asked, ``OutOfMemory`` where
    not even the smallest fits, ``RankFailed`` where another rank failed, and what the model itself raises.
    """
    from pytest_gputrain.memory.capacity import known_device

    place = known_device(device)
    bounds.checked_rank(ddp_rank, ddp_world_size)
    if override is not None:
        return manual(override, bounds.per_rank(global_batch_size, ddp_world_size), "override", rank=ddp_rank)

    settings = {
        "safety_margin": safety_margin,
        "min_batch_size": min_batch_size,
        "max_batch_size": max_batch_size,
        "global_batch_size": global_batch_size,
        "world_size": ddp_world_size,
        "strategy": strategy,
        "eval_batch_factor": eval_batch_factor,
        "optimizer": optimizer,
        "compiled": compiled,
        "cache_key_components": [max_seq_len, cache_key_components],
        "capacity": capacity,
    }

    def checked() -> _Asked:
        return _checked(
            settings, case, lambda: language_case(_given(model), max_seq_len, vocab_size), fallback
        )

    try:
        ranks = ranks_of(ddp_rank, ddp_world_size, place)
    except ValueError:
        checked()  # no rank waits for this one yet, so what is wrong with the rest is told first
        raise
    asked = ranks.own(checked)
    cache = _cache_in(cache_dir) if use_cache else None
    try:
        return JointDiscovery(ranks, asked.case, model, place, asked.settings, cache).size()
    except (DiscoveryFailed, RankFailed) as error:
        if isinstance(error, RankFailed) and not error.may_fall_back:
            raise
        size = asked.conservative
        log.warning("Auto-discovery failed (%s); falling back to device_batch_size=%d", error, size)
        return size


@dataclass(frozen=True)
class _Asked:
    """What is to be discovered. ``settings``: of ``find_batch``. conservative: the size without discovery."""

    case: TrainingCase
    settings: dict[str, Any]
    conservative: int


def _checked(
    given: dict[str, Any], case: object, otherwise: Callable[[], TrainingCase], fallback: int | None
) -> _Asked:
    """Settings of ``find_batch`` that are legal. otherwise: makes the case where none is given."""
    if case is not None and not isinstance(case, TrainingCase):
        raise ValueError(not_a_case(case))
    share = bounds.per_rank(given["global_batch_size"], given["world_size"])
    least, most = bounds.checked_range(given["min_batch_size"], given["max_batch_size"])
    sizes = legal_sizes(least, most, divides=share)
    settings = given | {
        "safety_margin": bounds.checked_margin(given["safety_margin"]),
        "min_batch_size": least,
        "max_batch_size": most,
        "strategy": checked_strategy(given["strategy"]),
        "eval_batch_factor": bounds.checked_factor(given["eval_batch_factor"]),
    }
    capacity = settings.pop("capacity")
    if capacity is not None:
        settings["capacity"] = capacity_in_bytes(capacity)
    return _Asked(
        case or otherwise(),
        settings,
        sizes[0] if fallback is None else bounds.dividing("fallback", fallback, share),
    )


def manual(size: object, share: int | None = None, name: str = "device_batch_size", *, rank: int = 0) -> int:
    """A size that the user chose, as ``name``. Raises ``ValueError`` when it is none, or does not divide
    ``share``.
    """
    chosen = bounds.dividing(name, size, share)
    if not rank:
        log.info("Using manual device_batch_size=%d", chosen)
    return chosen


def _given(model: torch.nn.Module | None) -> torch.nn.Module:
    if model is None:
        raise ValueError("model is None, with no case; give a model called as model(x, y), or case=")
    from torch.nn import Module

    if not isinstance(model, Module):
        raise ValueError(
            f"model is {model!r:.60} ({type(model).__name__}); legal is a torch.nn.Module called as "
            "model(x, y), or case="
        )
    return model


def _cache_in(folder: str | Path | None) -> BatchCache:
    from pytest_gputrain.batch.cache import BatchCache
    from pytest_gputrain.batch.cache_folder import cache_folder

    return BatchCache(cache_folder(folder))
