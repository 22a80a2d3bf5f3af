"""Model FLOP utilisation: the share of the GPUs' peak that products take at the speed measured. Pure.

From the tokens a second of a test, FLOPs a token (``flops_per_token`` among its figures, counted in a real
step, ``checks/flops.py``), their type (``flops_dtype``) and the peak of its machine's GPU. Where one of them
is missing there is no MFU, and it is said why. What activation checkpointing computes again counts as well.
"""

from __future__ import annotations

import re
from typing import Any

from pytest_gputrain.report.hardware import peak_flops
from pytest_gputrain.report.reading import Json

FLOPS, DTYPE = "flops_per_token", "flops_dtype"
_RANKS = re.compile(r"(\d+) ranks")
_RANK = re.compile(r"rank \d+")


def with_mfu(test: Json, machine: Json) -> tuple[list[Json], list[str]]:
    """The test's series, with those of MFU; and why there are none where FLOPs are known."""
    series: list[Json] = list(test.get("series") or ())
    figures = test.get("figures") or {}
    flops: Any = figures.get(FLOPS)
    speeds = [one for one in series if one.get("plot") == "tokens_per_second"]
    if not _above_zero(flops) or not speeds or any(one.get("plot") == "mfu" for one in series):
        return series, []
    dtype = str(figures.get(DTYPE) or "")
    if why := _hinders(test, machine, dtype):
        return series, [f"No MFU: {why}."]
    peak = peak_flops(machine["gpus"][0]["name"], dtype) or 1.0
    return [*series, *(_share(one, flops / (peak * _gpus(one, figures))) for one in speeds)], []


def _hinders(test: Json, machine: Json, dtype: str) -> str:
    gpus = [str(gpu.get("name")) for gpu in machine.get("gpus") or ()]
    if test.get("device") != "cuda" or not gpus:
        return "it ran on a CPU, of which no peak is known"
    if labels := [
        one for one in test.get("labels") or () if one in ("shared GPU", "simulated", "pretended GPUs")
    ]:
        return str(labels[0])
    if len({*gpus}) > 1:
        return f"GPUs of several kinds ({', '.join(sorted({*gpus}))})"
    if peak_flops(gpus[0], dtype) is None:
        return f"the peak of {gpus[0]} for {dtype or 'an unknown type'} is not known here"
    return ""


def _gpus(series: Json, figures: Json) -> int:
    """How many GPUs made those tokens: of a line of one rank one, else what the label or the figures say."""
    label = str(series.get("label") or "")
    if _RANK.fullmatch(label):
        return 1
    if found := _RANKS.search(label):
        return int(found[1])
    told = figures.get("world_size") or figures.get("ranks") or 1
    return told if isinstance(told, int) and told > 0 else 1


def _share(series: Json, factor: float) -> dict[str, Any]:
    y = [value * factor if isinstance(value, (int, float)) else None for value in series.get("y") or ()]
    return {"plot": "mfu", "label": series.get("label"), "unit": "fraction", "x": series.get("x"), "y": y}


def _above_zero(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and value > 0
