"""What a stability run comes to in figures: speed, memory, loss, and the curves that a report draws."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import median
from typing import TYPE_CHECKING, Any

from pytest_gputrain.checks.result import Figures
from pytest_gputrain.endurance.records import StepRecord
from pytest_gputrain.report.metrics import measured, once
from pytest_gputrain.report.mfu import DTYPE, FLOPS
from pytest_gputrain.report.model import Plot
from pytest_gputrain.report.series import series

if TYPE_CHECKING:
    from pytest_gputrain.checks.stable_told import Ended

_LAST = 10  # steps whose losses make the final one


def figures_of(
    by_rank: Sequence[Sequence[StepRecord]],
    losses: Mapping[int, float],
    ended: Sequence[Ended],
) -> Figures:
    """Seconds, bytes and tokens; ``metrics`` and ``series`` are for reports."""
    first = by_rank[0]
    timed = [record.seconds for record in first[1:]] or [record.seconds for record in first]
    seconds = median(timed) if timed else math.nan
    tokens = median(record.tokens for record in first) * len(by_rank) if first else 0
    peak = _peak(by_rank, ended)
    finite = [loss for loss in losses.values() if math.isfinite(loss)]
    figures: Figures = {"steps": len(first), "ranks": len(by_rank)}
    metrics: Figures = {}
    if seconds > 0:
        rates = [tokens / one for one in timed if one > 0]
        metrics["step_seconds"] = measured(timed, unit="s", better="lower")
        metrics["tokens_per_second"] = measured(rates, unit="tokens/s", better="higher")
    used = [record.cpu_seconds for record in first[1:]]
    # On a CPU the step is this process's work, which a busy machine hardly makes more of.
    if used and min(used) > 0 and not any(record.allocated_bytes for record in first):
        metrics["step_cpu_seconds"] = measured(used, unit="s", better="lower")
    metrics["peak_bytes"] = once(peak, unit="bytes", better="lower")
    if finite:
        last = finite[-_LAST:]
        metrics["final_loss"] = once(sum(last) / len(last), unit="", better="lower")
        figures |= {"first loss": finite[0], "final loss": metrics["final_loss"]["value"]}
    figures |= {"step seconds": seconds, "tokens/s": tokens / seconds if seconds > 0 else None}
    if (flops := ended[0].flops) is not None and tokens:
        figures |= {FLOPS: flops.number * len(by_rank) / tokens, DTYPE: flops.dtype}
    figures |= {"metrics": metrics, "series": _series(by_rank, losses), "notes": _notes(ended)}
    return figures


def _notes(ended: Sequence[Ended]) -> list[str]:
    found = list(dict.fromkeys(note for one in ended for note in one.notes))
    epochs = max((one.epochs for one in ended), default=0)
    if epochs > 1:
        found.append(f"batches() was begun {epochs} times: it holds fewer batches than there were steps")
    return found


def _peak(by_rank: Sequence[Sequence[StepRecord]], ended: Sequence[Ended]) -> int:
    told = [one.peak_bytes for one in ended if one.peak_bytes is not None]
    return max(told) if told else max((r.rss_bytes for records in by_rank for r in records), default=0)


def _series(by_rank: Sequence[Sequence[StepRecord]], losses: Mapping[int, float]) -> list[dict[str, Any]]:
    found = [_curve("loss", "mean of the ranks", "", list(losses.items()))]
    for rank, records in enumerate(by_rank):
        label = f"rank {rank}"
        speed = [(r.step, r.tokens / r.seconds) for r in records if r.seconds > 0]
        memory = [(r.step, float(r.allocated_bytes or r.rss_bytes)) for r in records]
        found += [
            _curve("step_seconds", label, "s", [(r.step, r.seconds) for r in records]),
            _curve("tokens_per_second", label, "tokens/s", speed),
            _curve("memory", label, "bytes", memory),
        ]
    return [curve for curve in found if curve["x"]]


def _curve(plot: Plot, label: str, unit: str, points: Sequence[tuple[int, float]]) -> dict[str, Any]:
    return series(plot, label, [value for _, value in points], x=[step for step, _ in points], unit=unit)
