"""What a node sees of its own ranks, for the others: how they stand, where they are, what they came to."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import output
from ..deadlock import Scene
from ..member import Member
from ..records import RankResult
from . import telling

if TYPE_CHECKING:
    from ..supervise import Supervision

_TAIL = 4096
"""Bytes at the end of a rank's heartbeats in which its last line is."""


def state(members: Sequence[Member], folder: Path) -> dict[str, Any]:
    """What heartbeats say: the ranks of this node, and the step the slowest of them has finished."""
    known = sorted(member.rank for member in members if member.pid is not None)
    steps = [found for rank in known if (found := _last_step(folder, rank)) is not None]
    step, at = min(steps, default=(None, 0.0))
    return {"ranks": known, "step": step, "since": max(0.0, time.time() - at) if steps else 0.0}


def _last_step(folder: Path, rank: int) -> tuple[int, float] | None:
    path = folder / f"rank{rank}" / f"heartbeat_rank{rank}.jsonl"
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - _TAIL))
            lines = file.read().splitlines()
            changed = path.stat().st_mtime
    except OSError:
        return None
    for line in reversed(lines):
        try:
            return int(json.loads(line)["step"]), changed
        except (ValueError, KeyError, TypeError):  # being written
            continue
    return None


def scenes(found: Mapping[int, Scene], members: Sequence[Member], spec: Mapping[str, Any]) -> dict[int, Any]:
    """Where ranks are, in the form in which it travels."""
    records = {member.rank: member.records for member in members}
    most = telling.kept(spec["nproc"] * spec["where"]["nnodes"])
    return {rank: telling.told_scene(scene, records.get(rank, []), most) for rank, scene in found.items()}


def results(supervision: Supervision, kind: str, folder: Path) -> list[RankResult]:
    """What became of the ranks of this machine, by rank."""
    members = supervision.members
    failures = [member.failed_at for member in members if member.failed_at is not None]
    # Only torchrun ends workers by itself, after the first of them has failed.
    first = min(failures, default=math.inf) if kind == "script" else math.inf
    ranks = [member.result(folder, supervision.began, ended_after=first) for member in members]
    ranks.sort(key=lambda rank: rank.rank)
    return ranks


def report(supervision: Supervision, spec: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """All that node 0 needs of this node for its verdict."""
    ranks = results(supervision, "script", folder)
    return {
        "ranks": [telling.told_rank(rank) for rank in ranks],
        "scenes": list(scenes(supervision.lookout.scenes, supervision.members, spec).values()),
        "failed_agents": [
            {"exit_code": agent["exit_code"], "signal": agent["signal"]}
            for agent in supervision.failed_agents
        ],
        "agent_output": output.read(folder / "agent0" / "stderr.log")[-telling.TEXT :],
        "slow": supervision.slow,
    }
