"""``throughput_comparison.json``: what a found batch size is worth, and what finding it cost."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from pytest_gputrain.origin import origin
from pytest_gputrain.schemas import head

FILE = "throughput_comparison.json"
# Apart, so that nobody adds a search to the time that training takes, or leaves it out unsaid.
FIGURES = (
    "device_batch_size",
    "accumulation_steps",
    "start_seconds",
    "discovery_seconds",
    "training_seconds",
    "tokens",
    "tokens_per_second",
    "peak_bytes",
    "final_loss",
)

Metrics = Mapping[str, Any]


def compare(pairs: Sequence[tuple[Metrics, Metrics]]) -> dict[str, Any]:
    """Medians over pairs (manual, auto) that were run in turn, so that a busy machine slows both sides.

    ``paid_back_after_seconds``: of training, until the time that discovery took has been won; None where
    the found size is not faster.
    """
    sides = {name: _side([pair[place] for pair in pairs]) for place, name in enumerate(("manual", "auto"))}
    ratios = [auto["tokens_per_second"] / manual["tokens_per_second"] for manual, auto in pairs]
    ratio = median(ratios)
    discovery = sides["auto"]["discovery_seconds"]
    first = pairs[0][1]
    return {
        **head("gputrain.throughput"),
        **sides,
        "auto_over_manual": ratio,
        "auto_over_manual_each": ratios,
        "paid_back_after_seconds": discovery / (ratio - 1) if ratio > 1 else None,
        "runs_each": len(pairs),
        **{name: first[name] for name in ("case", "device", "world_size", "steps", "total_batch_size")},
        "measured_on": origin(),
    }


def write(figures: Mapping[str, Any], folder: Path, device: str) -> Path:
    """Into ``throughput_comparison.json``; a CPU's into ``…-cpu.json`` where a GPU's are there already.

    Returns the file.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / FILE
    unfinished = folder / f".{FILE}.{os.getpid()}"
    if device == "cpu" and _is_of_a_gpu(path):
        path = path.with_stem(f"{path.stem}-cpu")
    unfinished.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    unfinished.replace(path)
    return path


def _side(runs: Sequence[Metrics]) -> dict[str, Any]:
    return {name: _middle([run[name] for run in runs]) for name in FIGURES}


def _middle(values: Sequence[Any]) -> Any:
    if any(value is None for value in values):
        return None
    return values[0] if all(value == values[0] for value in values) else median(values)


def _is_of_a_gpu(path: Path) -> bool:
    try:
        there = json.loads(path.read_text(encoding="utf-8"))
        return isinstance(there, dict) and there.get("device") == "cuda"
    except (OSError, ValueError):
        return False
