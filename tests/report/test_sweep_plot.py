"""The picture of a sweep: what is in it, and what it says where there is nothing to draw."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from pytest_gputrain.report.sweep_plot import Curve, Sweep, draw

pytest.importorskip("matplotlib")

CURVES = [
    Curve(1, [(100, 3.0), (200, 2.5)], 2.5, 2.6),
    Curve(4, [(200, 2.75)], 2.75, 2.8),
    Curve(16, [(150, 5.0)], 5.0, None, passed=False),
    Curve(32, [], None),
]


def texts_of(path: Path) -> list[str]:
    """The texts of an SVG: matplotlib draws glyphs, and keeps each text as a comment."""
    return re.findall(r"<!-- (.*?) -->", path.read_text(encoding="utf-8"))


def test_branches_by_tokens_and_by_k(tmp_path: Path) -> None:
    draw(Sweep("lm: 200 tokens a branch", CURVES, "torch 2.13"), tmp_path / "sweep.svg")
    texts = texts_of(tmp_path / "sweep.svg")
    for text in (
        "lm: 200 tokens a branch", "k=1", "k=4", "k=16 (not passed)", "tokens seen", "loss of the step",
        "k (batch by base batch)", "final loss", "evaluation", "32", "torch 2.13",
    ):  # fmt: skip
        assert text in texts, text
    assert "k=32" not in texts
    assert [path.name for path in tmp_path.iterdir()] == ["sweep.svg"]


def test_a_sweep_without_losses_says_so(tmp_path: Path) -> None:
    draw(Sweep("lm", [Curve(1, [], None)]), tmp_path / "sweep.svg")
    texts = texts_of(tmp_path / "sweep.svg")
    assert "no branch reports the loss of its steps" in texts
    assert "no branch that passed reports a loss" in texts


def test_a_picture_for_a_screen(tmp_path: Path) -> None:
    draw(Sweep("lm", CURVES), tmp_path / "sweep.png")
    assert (tmp_path / "sweep.png").read_bytes().startswith(b"\x89PNG")
