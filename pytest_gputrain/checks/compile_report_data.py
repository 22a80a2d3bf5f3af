"""What the compile checks leave for the report: a JSON file a case and check, written in the rank.

By whoever runs the checks the folder is turned into tables and pictures (``report/compile_report.py``).
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pytest_gputrain.case import TrainingCase
from pytest_gputrain.checks.context import CheckContext
from pytest_gputrain.schemas import head
from pytest_gputrain.whole_files import replacing

if TYPE_CHECKING:
    from pytest_gputrain.compile.records import CompileReport


def keep_curves(
    case: TrainingCase,
    ctx: CheckContext,
    eager: Sequence[float],
    compiled: Sequence[float],
    step_seconds: Mapping[str, Sequence[float]],
    batch: Any,
    report: CompileReport,
) -> None:
    """Losses and seconds by step, the tokens of one batch, and what dynamo did meanwhile."""
    if ctx.compile_report is None:
        return
    from pytest_gputrain.compile.batch_tokens import tokens_of

    tokens = tokens_of(batch, case.num_targets)
    data = {
        "eager": list(eager),
        "compiled": list(compiled),
        "step_seconds": {side: list(seconds) for side, seconds in step_seconds.items()},
        "tokens": tokens.total,
        "useful": tokens.total if tokens.useful is None else tokens.useful,
        "unit": tokens.unit,
        "backend": ", ".join(sorted({graph.backend for graph in report.graphs})) or "none",
        "monitor": report.as_json(),
    }
    keep(case, ctx, "parity", data)


def keep(case: TrainingCase, ctx: CheckContext, what: str, data: Mapping[str, Any]) -> None:
    """Write ``CASE-DEVICE-WHAT.json``; nothing where the context names no folder."""
    if ctx.compile_report is None:
        return
    from pytest_gputrain.origin import origin

    folder = Path(ctx.compile_report)
    folder.mkdir(parents=True, exist_ok=True)
    about = {"case": case.name, "device": ctx.device, "kind": what, "origin": origin()}
    document = {**head("gputrain.compile"), **about, **data}
    path = folder / f"{safe(case.name)}-{ctx.device}-{what}.json"
    with replacing(path) as unfinished:
        unfinished.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


def safe(name: str) -> str:
    """A case's name as part of a file's."""
    return re.sub(r"[^\w.+-]+", "_", name).strip("._") or "case"


def write_compile_report(ctx: CheckContext) -> None:
    """The page and the pictures of all that is in the context's folder, where it names one that is there."""
    if ctx.compile_report is None or not Path(ctx.compile_report).is_dir():
        return
    from pytest_gputrain.report.compile_report import write_report

    write_report(Path(ctx.compile_report))
