"""From the results of the tensor-parallel checks on a case to its report on disk. Imports no torch."""

from __future__ import annotations

import datetime
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pytest_gputrain.checks.result import CheckResult
from pytest_gputrain.origin import origin
from pytest_gputrain.report.tp_report import Line, RankMemory, Report, write

IDS = "tp_"


def write_reports(
    results: Iterable[CheckResult], folder: Path, *, device: str, world_size: int, simulated: bool = False
) -> list[Path]:
    """``NAME_test_report.txt`` a case, and ``NAME_gradients.png`` beside it where matplotlib is installed.

    NAME is the case's without signs (``opt-125m``: ``opt125m``). Returns the text files. Raises OSError.
    """
    by_case: dict[str, list[CheckResult]] = {}
    for result in results:
        if result.check.startswith(IDS):
            by_case.setdefault(result.case, []).append(result)
    ranks = ranks_text(device, world_size, simulated)
    return [_write(report_of(name, found, ranks), folder, name) for name, found in by_case.items()]


def ranks_text(device: str, world_size: int, simulated: bool) -> str:
    kind = "simulated" if simulated else "NCCL" if device == "cuda" else "gloo"
    return f"{world_size} {kind} ranks"


def report_of(title: str, results: Sequence[CheckResult], ranks: str) -> Report:
    backward = _figures(results, "tp_backward")
    memory = _figures(results, "tp_memory")
    return Report(
        title=title,
        ranks=ranks,
        tests=[Line(one.check, one.outcome, one.seconds, one.figures, one.message) for one in results],
        date=datetime.datetime.now().strftime("%Y-%m-%d %H:%M:%S"),
        layers=backward.get("error by layer", {}),
        tolerance=backward.get("tolerance"),
        memory=_by_rank(memory),
        whole=_whole(memory),
        origin=origin(),
    )


def _figures(results: Sequence[CheckResult], check: str) -> Mapping[str, Any]:
    return next((one.figures for one in results if one.check == check), {})


def _by_rank(memory: Mapping[str, Any]) -> list[RankMemory]:
    numbers, sizes = memory.get("parameters by rank", ()), memory.get("bytes by rank", ())
    return [RankMemory(*pair) for pair in zip(numbers, sizes, strict=True)]


def _whole(memory: Mapping[str, Any]) -> RankMemory | None:
    if "whole parameters" not in memory:
        return None
    return RankMemory(memory["whole parameters"], memory["whole bytes"])


def _write(report: Report, folder: Path, name: str) -> Path:
    from pytest_gputrain.report import ladder_plot

    stem = re.sub(r"[^A-Za-z0-9]", "", name) or "model"
    path = write(report, folder / f"{stem}_test_report.txt")
    if report.layers and ladder_plot.missing() is None:
        from pytest_gputrain.report.tp_plot import draw

        draw(report, folder / f"{stem}_gradients.png")
    return path
