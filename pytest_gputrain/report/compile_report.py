"""What the compile checks left in a folder, as ``compile.md`` and a picture a case. Imports no torch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pytest_gputrain.report.compile_table import table
from pytest_gputrain.whole_files import replacing

PAGE = "compile.md"
_PARITY, _SPEED = "parity", "speed"


def write_report(folder: Path) -> list[Path]:
    """Write the page and the pictures; returns them, none where no check left anything. Raises OSError.

    Without matplotlib the page says what to install, and is whole otherwise.
    """
    found = _documents(folder)
    if not found:
        return []
    from pytest_gputrain.report.ladder_plot import missing

    lacking = missing()
    lines, written = ["# Eager against compiled", ""], []
    for (case, device), documents in sorted(found.items()):
        parity = documents.get(_PARITY)
        speeds = [one for kind, one in sorted(documents.items()) if kind.startswith(_SPEED)]
        lines.append(table(f"{case}, {device}", parity, speeds))
        if parity and parity["eager"]:
            if lacking is None:
                written.append(_picture(folder, parity))
                lines += [f"![loss, distance and recompiles by step]({written[-1].name})", ""]
            else:
                lines += [lacking, ""]
    page = folder / PAGE
    with replacing(page) as unfinished:
        unfinished.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return [page, *written]


def _documents(folder: Path) -> dict[tuple[str, str], dict[str, Any]]:
    """By case and device, by kind. What is no report of ours is passed over."""
    found: dict[tuple[str, str], dict[str, Any]] = {}
    for path in sorted(folder.glob("*.json")):
        try:
            document = json.loads(path.read_text(encoding="utf-8"))
            key, kind = (str(document["case"]), str(document["device"])), str(document["kind"])
        except (OSError, ValueError, KeyError, TypeError):
            continue
        if kind.startswith((_PARITY, _SPEED)):
            found.setdefault(key, {})[kind] = document | {"file": path.stem}
    return found


def _picture(folder: Path, document: dict[str, Any]) -> Path:
    from pytest_gputrain.report.compile_plot import Curves, draw

    monitor, origin = document["monitor"], document.get("origin", {})
    path = folder / f"{document['file']}.png"
    curves = Curves(
        f"{document['case']}: eager and compiled from the same weights",
        document["eager"],
        document["compiled"],
        _steps(monitor["recompiles"]),
        _steps(monitor["breaks"]),
        f"{document['device']}, backend {document['backend']}, torch {origin.get('torch')}, "
        f"commit {origin.get('commit')}",
    )
    draw(curves, path)
    return path


def _steps(events: list[dict[str, Any]]) -> list[int]:
    """Of training: what was compiled for the single steps before has no place on the axis."""
    return [one["step"] for one in events if one["step"] is not None and one["phase"] == "train"]
