"""What every benchmark here shares: interleaved runs, medians, a table, a JSON file that carries its origin.

Rivals run in turn, round by round, so that a machine that becomes busy slows all of them alike.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from pytest_gputrain.origin import origin

RESULTS = Path(__file__).parent / "results"


def interleave(
    rivals: Mapping[str, Callable[[], object]], rounds: int, warm_up: int = 1
) -> dict[str, list[float]]:
    """Run each rival once a round and return its seconds by round; ``warm_up`` rounds are not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in rivals}
    for number in range(warm_up + rounds):
        for name, run in rivals.items():
            start = time.perf_counter()
            run()
            if number >= warm_up:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def report(name: str, seconds: Mapping[str, list[float]], figures: Mapping[str, float | int | str]) -> None:
    """Print the medians and the figures drawn from them, and write both to ``results/NAME.json``."""
    width = max(map(len, seconds))
    print(f"{'':{width}}     median        min        max   runs")
    for rival, runs in seconds.items():
        cells = "".join(
            f"{value * 1000:8.1f} ms" for value in (statistics.median(runs), min(runs), max(runs))
        )
        print(f"{rival:{width}}{cells}  {len(runs):5}")
    for figure, value in figures.items():
        print(f"{figure}: {value:.3g}" if isinstance(value, float) else f"{figure}: {value}")
    measured = {
        rival: {"median_s": round(statistics.median(runs), 5), "runs_s": [round(run, 5) for run in runs]}
        for rival, runs in seconds.items()
    }
    document = {"benchmark": name, "origin": origin(), "figures": dict(figures), "measured": measured}
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    print(f"written to {path.relative_to(RESULTS.parent.parent)}")
