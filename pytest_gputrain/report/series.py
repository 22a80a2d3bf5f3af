"""Series as checks hand them over in ``figures["series"]``: a line of one of the report's plots. Pure."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from pytest_gputrain.report.model import Plot


def series(
    plot: Plot,
    label: str,
    y: Sequence[float | None],
    *,
    unit: str = "",
    x: Sequence[float] | None = None,
    limit: float | None = None,
    limit_label: str = "",
    names: Sequence[str] = (),
) -> dict[str, Any]:
    """A line: ``y`` over ``x``, or over 0, 1, 2, … A ``y`` that is None or not finite is a gap.

    limit: what ``y`` has to stay below; names: of the places on the x axis, where they are no numbers.
    Raises ValueError where there are not as many ``x`` or ``names`` as ``y``.
    """
    places = list(range(len(y))) if x is None else list(x)
    if len(places) != len(y) or (names and len(names) != len(y)):
        counted = f"{len(y)} y, {len(places)} x" + (f" and {len(names)} names" if names else "")
        raise ValueError(f"series {label!r} has {counted}; give as many of each")
    values = [None if one is None or not math.isfinite(one) else float(one) for one in y]
    made: dict[str, Any] = {"plot": plot, "label": label, "unit": unit, "x": places, "y": values}
    if limit is not None and math.isfinite(limit):
        made |= {"limit": float(limit), "limit_label": limit_label}
    return {**made, "names": list(names)} if names else made


def by_name(
    plot: Plot, label: str, values: Mapping[str, float], *, unit: str = "", limit: float | None = None,
    limit_label: str = "",
) -> dict[str, Any]:  # fmt: skip
    """A line over names, as of layers, in the order in which they come."""
    return series(
        plot, label, [*values.values()], unit=unit, limit=limit, limit_label=limit_label, names=[*values]
    )
