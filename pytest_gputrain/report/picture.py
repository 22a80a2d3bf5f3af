"""What pictures drawn with matplotlib share: no display, a footnote, a file that is whole or not there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pytest_gputrain.whole_files import replacing

GREY = "#7A7A7A"


def canvas(width: float, height: float) -> Any:
    """An empty figure of so many inches."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    # Not pyplot: it keeps figures, and chooses a backend for the whole process.
    figure = Figure(figsize=(width, height), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def save(figure: Any, path: Path, footnote: str = "", *, fontsize: float = 7.5) -> None:
    """Write the picture, PNG or SVG by the file's suffix. footnote: where this comes from. Raises OSError."""
    if footnote:
        figure.supxlabel(footnote, fontsize=fontsize, color=GREY, x=0.01, ha="left")
    metadata = {"Date": None} if path.suffix == ".svg" else {}  # the same picture is the same file
    with replacing(path) as unfinished:
        figure.savefig(unfinished, format=path.suffix.removeprefix("."), metadata=metadata)
