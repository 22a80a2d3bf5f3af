"""What one node tells another about its ranks, as JSON: results, where each is, and its collectives. Pure."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ..deadlock import Scene, from_json
from ..records import RankError, RankResult

MOST_RECORDS = 131_072
"""Collectives of all ranks together that node 0 gets; of 65 ranks or more each sends fewer than it keeps."""
TEXT = 8192
"""Characters of a stream or a stack that travel: the last ones. The whole stays on the rank's machine."""
_FIELDS = (
    "rank", "state", "blocked", "location", "source", "waits_in", "complete", "peers", "all_messages",
    "handles",
)  # fmt: skip
Records = Sequence[Mapping[str, Any]]


def kept(world_size: int) -> int:
    """How many of its last collectives each rank sends."""
    return max(64, MOST_RECORDS // max(1, world_size))


def told_records(records: Records, most: int) -> dict[str, Any]:
    """The last ``most`` records, with what repeats (operation, group, line) in tables."""
    tables: dict[str, dict[Any, int]] = {"texts": {}, "ranks": {}}

    def number(table: str, value: Any) -> int:
        return tables[table].setdefault(value, len(tables[table]))

    rows = [
        [
            record["seq"],
            number("texts", record["op"]),
            record["sizes"],
            [number("texts", dtype) for dtype in record["dtypes"]],
            number("texts", record["group"]),
            number("ranks", tuple(record["ranks"])),
            int(record["state"] == "waiting"),
            number("texts", record["location"]),
            record["at"],
            number("texts", record["note"]),
            record.get("root"),
        ]
        for record in records[-most:]
    ]
    return {
        "texts": list(tables["texts"]),
        "ranks": [_spans(ranks) for ranks in tables["ranks"]],
        "rows": rows,
    }


def records_told(told: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Records as ``recorder.py`` has them, from what ``told_records`` made of them."""
    texts, ranks = told["texts"], [_listed(spans) for spans in told["ranks"]]
    return [
        {
            "seq": seq, "op": texts[op], "sizes": sizes, "dtypes": [texts[one] for one in dtypes],
            "group": texts[group], "ranks": ranks[members], "state": "waiting" if waiting else "done",
            "location": texts[location], "at": at, "note": texts[note],
            **({} if root is None else {"root": root}),
        }
        for seq, op, sizes, dtypes, group, members, waiting, location, at, note, root in told["rows"]
    ]  # fmt: skip


def _spans(ranks: Iterable[int]) -> list[list[int]]:
    """``[[0, 511], [513, 513]]``, in the order given."""
    spans: list[list[int]] = []
    for rank in ranks:
        if spans and rank == spans[-1][1] + 1:
            spans[-1][1] = rank
        else:
            spans.append([rank, rank])
    return spans


def _listed(spans: Iterable[Sequence[int]]) -> list[int]:
    return [rank for first, last in spans for rank in range(first, last + 1)]


def told_scene(scene: Scene, records: Records, most: int) -> dict[str, Any]:
    """A rank at one moment, with its collectives."""
    return {name: getattr(scene, name) for name in _FIELDS} | {"records": told_records(records, most)}


def scene_told(told: Mapping[str, Any]) -> tuple[Scene, list[dict[str, Any]]]:
    """(the scene, its records)."""
    records = records_told(told["records"])
    fields = {name: told[name] for name in _FIELDS}
    fields["peers"] = tuple(fields["peers"])
    return Scene(calls=from_json(records), **fields), records


def told_rank(result: RankResult) -> dict[str, Any]:
    """What became of a rank. A value does not travel: scripts return none."""
    error = result.error
    told = dataclasses.asdict(dataclasses.replace(result, value=None, attached=b"", error=None))
    del told["value"], told["attached"]
    for name in ("stdout", "stderr", "stacks"):
        told[name] = told[name][-TEXT:]
    if error is not None:
        told["error"] = dataclasses.asdict(error) | {"traceback": error.traceback[-TEXT:]}
    return told


def rank_told(told: Mapping[str, Any]) -> RankResult:
    """The same, on node 0."""
    error = RankError(**told["error"]) if told["error"] else None
    return RankResult(**{**told, "error": error})
