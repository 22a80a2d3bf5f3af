"""Reads what ranks left in the folder of a phase. A missing or torn file is nothing."""

from __future__ import annotations

import json
import re
from collections import defaultdict
from pathlib import Path
from typing import Any

from pytest_gputrain.diagnose.records import Missing

_STEP = re.compile(r"\[GRAD-TRACE\] after_backward_step(\d+) arrived=\d+ missing=\d+")
_MISSING = "  - MISSING: "
_BUCKET = re.compile(r"\[DDP\] rank=\d+ bucket_elems=\d+ dtype=\S+")


def rank_folders(folder: Path) -> dict[int, Path]:
    """The ranks' folders by rank."""
    found = {}
    for path in folder.glob("rank*"):
        if path.is_dir() and path.name.removeprefix("rank").isdecimal():
            found[int(path.name.removeprefix("rank"))] = path
    return dict(sorted(found.items()))


def text_of(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def traces(folder: Path) -> dict[int, str]:
    """What the tracers of each rank wrote."""
    found = {rank: text_of(path / "traces.log") for rank, path in rank_folders(folder).items()}
    return {rank: text for rank, text in found.items() if text}


def missing(traced: dict[int, str], finished: dict[int, int] | None = None) -> tuple[Missing, ...]:
    """Parameters that got no gradient, in the order in which they were first told.

    finished: how many steps each rank finished, where not all did. What a backward that broke off had not
    yet reached is no parameter without a gradient.
    """
    moments: set[tuple[int, int]] = set()
    seen: dict[str, set[tuple[int, int]]] = defaultdict(set)
    for rank, text in traced.items():
        moment: tuple[int, int] | None = None
        for line in text.splitlines():
            if (match := _STEP.search(line)) is not None:
                moment = (rank, int(match[1]))
                if finished is not None and moment[1] > finished.get(rank, 0):
                    break
                moments.add(moment)
            elif line.startswith(_MISSING) and moment is not None:
                seen[line.removeprefix(_MISSING).strip()].add(moment)
    return tuple(
        Missing(
            name,
            tuple(sorted({rank for rank, _ in where})),
            tuple(sorted({step for _, step in where})),
            where == moments,
        )
        for name, where in seen.items()
    )


def buckets(traced: dict[int, str]) -> list[str]:
    """The lines about DDP's buckets, of all ranks."""
    return [match[0] for text in traced.values() for match in _BUCKET.finditer(text)]


def facts(folder: Path) -> dict[int, dict[str, Any]]:
    """What each rank told of itself (``trace/study.py``)."""
    found = {}
    for path in sorted(folder.glob("facts_rank*.json")):
        number = path.stem.removeprefix("facts_rank")
        document = _json(text_of(path))
        if number.isdecimal() and isinstance(document, dict):
            found[int(number)] = document
    return found


def gradients(folder: Path, rank: int = 0) -> list[dict[str, Any]]:
    """The noted gradients of one rank, by step."""
    lines = text_of(folder / f"gradients_rank{rank}.jsonl").splitlines()
    documents = [_json(line) for line in lines]
    return [document["gradients"] for document in documents if isinstance(document, dict)]


def collectives(folder: Path) -> dict[int, list[dict[str, Any]]]:
    """The collectives of each rank, oldest first."""
    found = {}
    for rank, path in rank_folders(folder).items():
        records = _json(text_of(path / "collectives.json"))
        if isinstance(records, list) and records:
            found[rank] = [record for record in records if isinstance(record, dict)]
    return found


def _json(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:  # the rank was ended while it wrote
        return None
