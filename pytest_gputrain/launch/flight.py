"""In a rank: what torch's flight recorder holds, in the form of a record that ``recorder.py`` describes."""

from __future__ import annotations

import pickle
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from . import calls, stacks

_DTYPES = {
    "Float": "float32", "Double": "float64", "Half": "float16", "BFloat16": "bfloat16", "Long": "int64",
    "Int": "int32", "Short": "int16", "Char": "int8", "Byte": "uint8", "Bool": "bool",
}  # fmt: skip
_DDPS_OWN = {"_engine_run_backward": "in backward", "_sync_buffers": "DDP's buffers"}
"""Python functions that call collectives which the user's line does not show."""

_made: dict[str, list[int]] = {}


def entries() -> Sequence[Mapping[str, Any]] | None:
    """The entries of torch's recorders with their Python frames; None without torch's distributed package."""
    bindings = sys.modules.get("torch._C._distributed_c10d")
    if bindings is None:
        return None
    found = {}
    for name in ("_dump_nccl_trace", "_dump_fr_trace"):  # one for NCCL, where it is built in, and one for all
        if (dump := getattr(bindings, name, None)) is not None:
            for entry in pickle.loads(dump()).get("entries", ()):
                found[entry["record_id"], entry["profiling_name"], entry["time_created_ns"]] = entry
    return list(found.values())


def remember(
    size: int, _rank: int, ranks: Sequence[int], _backend: Any, _store: Any, group_name: Any = "", **_: Any
) -> None:
    """Takes down whose group is about to be made; no list of ranks means the whole world."""
    _made[str(group_name)] = sorted(ranks) or list(range(size))


def group_ranks() -> dict[str, list[int]]:
    """The global ranks of each group that this rank is or was in, by the group's name."""
    import torch.distributed.distributed_c10d as c10d

    world = c10d._world
    found = dict(_made)  # torch forgets those that are destroyed, and its recorder does not
    for group, ranks in list(world.pg_group_ranks.items()):
        if (name := world.pg_names.get(group)) is not None:
            found[str(name)] = sorted(ranks)
    return found


def as_record(entry: Mapping[str, Any], ranks: Mapping[str, list[int]]) -> dict[str, Any]:
    frames = [stacks.Frame(f["filename"], f["line"], f["name"]) for f in entry.get("frames", ())]
    group = str(entry["process_group"][0])
    done = entry.get("retired") or entry.get("state") == "completed"
    created = entry.get("time_created_ns")
    return {
        "seq": entry["collective_seq_id"],
        "op": operation(entry["profiling_name"]),
        "sizes": entry.get("input_sizes") or entry.get("output_sizes") or [],
        "dtypes": [_DTYPES.get(name, name.lower()) for name in entry.get("input_dtypes", ())],
        "group": group,
        "ranks": ranks.get(group, []),
        "state": "done" if done else "waiting",
        "location": str(frame) if (frame := stacks.user_frame(frames)) else None,
        "at": created / 1e9 if created else None,
        "note": next((_DDPS_OWN[f.function] for f in frames if f.function in _DDPS_OWN), None),
    }


def operation(name: str) -> str:
    """``gloo:all_reduce`` and ``nccl:_all_gather_base`` by their names in torch.distributed."""
    name = name.rpartition(":")[2].lstrip("_")
    return calls.NAMES.get(name, name)
