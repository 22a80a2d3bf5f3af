"""The picture of a memory ladder: what is in it, in both formats, without a display."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from pytest_gputrain.report.ladder_plot import Ladder, draw, missing

pytest.importorskip("matplotlib")

GIB = 2**30
POINTS = [(1, 0.9 * GIB), (64, None), (23, None), (2, 1.0 * GIB), (22, 3.1 * GIB)]
LADDER = Ladder(
    title="gpt on cpu: device batch size 22, measured",
    points=POINTS,
    law=(0.8 * GIB, 0.1 * GIB),
    capacity=4 * GIB,
    limit=int(3.4 * GIB),
    size=22,
    footnote="torch 2.13",
)


def texts_of(path: Path) -> list[str]:
    """The texts of an SVG: matplotlib draws glyphs, and keeps each text as a comment."""
    return re.findall(r"<!-- (.*?) -->", path.read_text(encoding="utf-8"))


def test_a_picture_says_it_all(tmp_path: Path) -> None:
    draw(LADDER, tmp_path / "ladder.svg")
    texts = texts_of(tmp_path / "ladder.svg")
    for text in (
        "gpt on cpu: device batch size 22, measured",
        "batch size 22",
        "limit 3.4 GiB (85% of capacity)",
        "capacity 4 GiB",
        "line: 0.8 GiB + 0.1 GiB a sample",
        "measured peak",
        "out of memory",
        "64 too →",
        "device batch size",
        "peak memory, GiB",
        "torch 2.13",
    ):
        assert text in texts


def test_a_prediction_has_its_error_bar_and_small_ones_their_unit(tmp_path: Path) -> None:
    points, law = [(1, 30 * 2**20)], (20 * 2**20, 10 * 2**20)
    small = Ladder("net", points, law, 10**8, 85 * 10**6, 1, floor=35 * 2**20, error_bar=(-0.1, 0.05))
    draw(small, tmp_path / "ladder.svg")
    texts = texts_of(tmp_path / "ladder.svg")
    for text in (
        "predicted peak",
        "error bar, -10% to +5%",
        "peak memory, MiB",
        "line: 20 MiB + 10 MiB a sample",
    ):
        assert text in texts


def test_nothing_that_fits_is_a_picture_too(tmp_path: Path) -> None:
    draw(Ladder("net", [(1, None)], None, 10**8, 10**8, 0), tmp_path / "ladder.png")
    assert (tmp_path / "ladder.png").read_bytes().startswith(b"\x89PNG")
    draw(Ladder("net", [(1, None)], None, 10**8, 10**8, 0), tmp_path / "ladder.svg")
    texts = texts_of(tmp_path / "ladder.svg")
    assert "out of memory" in texts
    assert not any(text.startswith(("line", "batch size")) for text in texts)


def test_it_needs_no_display_and_leaves_matplotlib_as_it_was(tmp_path: Path) -> None:
    program = (
        "import sys\nfrom pathlib import Path\nfrom tests.report.test_ladder_plot import LADDER, draw\n"
        "draw(LADDER, Path(sys.argv[1]))\nassert 'matplotlib.pyplot' not in sys.modules\n"
    )
    root = Path(__file__).parents[2]
    environ = {name: value for name, value in os.environ.items() if name not in ("DISPLAY", "MPLBACKEND")}
    done = subprocess.run(
        [sys.executable, "-c", program, tmp_path / "ladder.png"],
        env={**environ, "PYTHONPATH": str(root), "MPLBACKEND": "TkAgg"}, cwd=tmp_path,
        stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=100, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "ladder.png").stat().st_size > 10_000


def test_without_matplotlib_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    assert missing() is None
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert missing() == (
        "a plot needs matplotlib, which is not installed: pip install 'pytest-gputrain[report]'"
    )
