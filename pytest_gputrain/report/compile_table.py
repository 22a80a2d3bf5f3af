"""Eager against compiled as a table: how fast, how large, what was compiled and why again. Imports no torch.

Made from what the compile checks leave in a folder (``checks/compile_report_data.py``): a measurement of
speed where there is one, else the steps of the comparison, which are labelled as that.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pytest_gputrain.compile.speed import MIB, WARM_UP, percentile, settled

Document = Mapping[str, Any]
ABSENT = "not measured"
_SHOWN = 20  # of recompiles, the rest is counted


def table(name: str, parity: Document | None, speeds: Sequence[Document]) -> str:
    """Markdown of one case on one device: a heading, the table, the recompiles with their reasons, the
    origin.
    """
    columns = [_from_speed(speed) for speed in speeds] or ([_from_parity(parity)] if parity else [])
    lines = [f"## {name}", ""]
    for title, rows in columns:
        lines += [f"{title}", "", "| | eager | compiled |", "|---|---|---|"]
        lines += [f"| {row} | {eager} | {compiled} |" for row, eager, compiled in rows]
        lines.append("")
    if parity:
        lines += _losses(parity)
    for document in [parity, *speeds]:
        if document:
            lines += _recompiles(document)
            break
    origin = (parity or (speeds[0] if speeds else {})).get("origin", {})
    return "\n".join([*lines, *_origin(origin), ""])


def _from_speed(document: Document) -> tuple[str, list[tuple[str, str, str]]]:
    """Measured in turn by ``compile_speed``."""
    eager, compiled, ratio = document["eager"], document["compiled"], document["ratio"]
    ranks = document["world_size"]
    title = (
        f"Measured on {document['device']}, {ranks} rank{'s' if ranks > 1 else ''}, in blocks of steps in "
        "turn, "
        f"{document['warm_up']} steps of warm-up left out; {document['tokens_per_step']} tokens a step, "
        f"{document['useful_per_step']} of use. "
        f"**{ratio['median']:.2f} times as fast** ({ratio['low']:.2f} to {ratio['high']:.2f}, "
        f"{len(ratio['each'])} pairs of blocks)."
    )
    rows = [
        ("tokens/s", _number(eager["tokens_per_second"]), _number(compiled["tokens_per_second"])),
        ("useful tokens/s", _number(eager["useful_per_second"]), _number(compiled["useful_per_second"])),
        *_step_rows(eager["step_seconds"], compiled["step_seconds"]),
        ("peak memory", _memory(eager["peak_bytes"]), _memory(compiled["peak_bytes"])),
        ("first compile", "", f"{document['first_compile_seconds']:.1f} s"),
        ("graphs", "", str(document["graphs"])),
        ("graph breaks", "", str(document["breaks"])),
        ("recompiles", "", str(len(document["recompiles"]))),
    ]
    return title, rows


def _from_parity(document: Document) -> tuple[str, list[tuple[str, str, str]]]:
    """Steps of ``compile_parity``, which were not run in turn."""
    monitor = document["monitor"]
    by_step: dict[int, float] = {
        one["step"]: one["compile_seconds"]
        for one in monitor["steps"]
        if one["step"] is not None and one["phase"] == "train"
    }
    first = settled(by_step)
    seconds = {side: document["step_seconds"][side][first:] for side in ("eager", "compiled")}
    unit = document["unit"]
    rates = [
        (f"{what}/s", _rate(number, seconds["eager"]), _rate(number, seconds["compiled"]))
        for what, number in ((unit, document["tokens"]), (f"useful {unit}", document["useful"]))
    ]
    title = (
        f"From the steps of compile_parity on {document['device']} (backend {document['backend']}), one side "
        "after "
        f"the other, the first {max(first, WARM_UP)} left out: no measurement of speed, which "
        "`compile_speed` is."
    )
    rows = [
        *rates,
        *_step_rows(seconds["eager"], seconds["compiled"]),
        ("peak memory", ABSENT, ABSENT),
        ("compile time", "", f"{monitor['compile_seconds']:.1f} s"),
        ("graphs", "", str(len(monitor["graphs"]))),
        ("graph breaks", "", str(len(monitor["breaks"]))),
        ("recompiles", "", str(len(monitor["recompiles"]))),
    ]
    return title, rows


def _step_rows(eager: Sequence[float], compiled: Sequence[float]) -> list[tuple[str, str, str]]:
    return [
        (f"step time, p{part * 100:.0f}", _milliseconds(eager, part), _milliseconds(compiled, part))
        for part in (0.5, 0.95)
    ]


def _losses(document: Document) -> list[str]:
    eager, compiled = document["eager"], document["compiled"]
    if not eager:
        return []
    return [
        f"Loss after {len(eager)} steps: {eager[-1]:.6g} eager, {compiled[-1]:.6g} compiled; the largest "
        "difference "
        f"of a step is {max(abs(one - other) for one, other in zip(eager, compiled, strict=True)):.2g}.",
        "",
    ]


def _recompiles(document: Document) -> list[str]:
    """A line a recompile, with dynamo's reason."""
    found = document.get("monitor", {}).get("recompiles") or [
        {"reason": reason} for reason in document.get("recompiles", ())
    ]
    if not found:
        return []
    lines = ["Recompiles:", ""]
    for one in found[:_SHOWN]:
        where = f" of {one['function']} at {one['location']}" if "function" in one else ""
        when = f", {one['phase']} step {one['step']}" if one.get("step") is not None else ""
        lines.append(f"- {' '.join(one['reason'].split())}{where}{when}")
    if len(found) > _SHOWN:
        lines.append(f"- and {len(found) - _SHOWN} more")
    return [*lines, ""]


def _origin(origin: Mapping[str, Any]) -> list[str]:
    if not origin:
        return []
    return [
        f"Measured at {origin.get('time')} on {origin.get('gpus')}, {origin.get('cpu')}, torch "
        f"{origin.get('torch')}, commit {origin.get('commit')}.",
        "",
    ]


def _rate(number: int, seconds: Sequence[float]) -> str:
    """A second, at ``number`` a step."""
    return _number(number * len(seconds) / sum(seconds)) if seconds else ABSENT


def _number(value: float) -> str:
    return f"{value:,.0f}"


def _memory(value: int | None) -> str:
    return ABSENT if value is None else f"{value / MIB:,.0f} MiB"


def _milliseconds(values: Sequence[float], part: float) -> str:
    return f"{percentile(values, part) * 1e3:.3g} ms" if values else ABSENT
