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

if TYPE_CHECKING:
    from pytest_gputrain.compile.records import CompileReport


def keep_curves(
    case: TrainingCase,
    ctx: CheckContext,
    eager: Sequence[float],
    compiled: Sequence[float],
    report: CompileReport,
) -> None:
    """Losses by step, and what dynamo did meanwhile."""
    keep(case, ctx, "parity", {"eager": list(eager), "compiled": list(compiled), "monitor": report.as_json()})


def keep(case: TrainingCase, ctx: CheckContext, what: str, data: Mapping[str, Any]) -> None:
    """Write ``CASE-DEVICE-WHAT.json``; nothing where the context names no folder."""
    if ctx.compile_report is None:
        return
    from pytest_gputrain.origin import origin

    folder = Path(ctx.compile_report)
    folder.mkdir(parents=True, exist_ok=True)
    document = {"case": case.name, "device": ctx.device, "kind": what, "origin": origin(), **data}
    path = folder / f"{safe(case.name)}-{ctx.device}-{what}.json"
    path.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


def safe(name: str) -> str:
    """A case's name as part of a file's."""
    return re.sub(r"[^\w.+-]+", "_", name).strip("._") or "case"
