"""What is wrong with a run, as its judges say it. Imports no torch."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from pytest_gputrain.launch.output import rank_list


@dataclass(frozen=True)
class Finding:
    """kind: "not_finite", "divergence", "loss", "data_order", "memory", …; step, rank: where it showed, None
    where that is no one place. message: the first line says what, where and what to do.
    """

    kind: str
    step: int | None
    rank: int | None
    message: str
    figures: Mapping[str, Any] = field(default_factory=dict)


def on(ranks: Collection[int], world_size: int) -> str:
    """``on every rank``, ``on rank 1``, ``on ranks 0, 2``: all of which something is true."""
    return "on every rank" if len(ranks) == world_size > 1 else f"on {rank_list(ranks)}"


def only(ranks: Collection[int]) -> int | None:
    """The rank of a finding: the one that it is true of, None for several."""
    return next(iter(ranks)) if len(ranks) == 1 else None
