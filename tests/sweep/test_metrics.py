"""What is read of what scripts report, and what is found in it. Pure."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from pytest_gputrain.sweep.findings import Observed, Rate, notes, observed_of, wrong
from pytest_gputrain.sweep.metrics import Point, Reported, read_reported
from pytest_gputrain.sweep.results import MOST_POINTS, curve_of

VALUES: dict[str, Any] = {
    "learning_rate": 4e-3, "num_steps": 4, "accumulation_steps": 2, "last_step_accumulation_steps": 2,
    "total_batch_size": 8, "tokens": 248, "block_size": 8, "last_step_sequences": 7,
}  # fmt: skip


def read(tmp_path: Path, text: str | None = None, printed: str = "") -> Reported:
    path = tmp_path / "metrics.jsonl"
    if text is not None:
        path.write_text(text)
    return read_reported(path, printed)


def test_lines_of_json_in_the_file_go_before_what_is_printed(tmp_path: Path) -> None:
    lines = [
        {"step": 1, "loss": 3, "tokens": 64, "lr": 0.1},
        {"final_loss": 2.5, "tokens": 248, "eval_loss": 3.5},
    ]
    found = read(tmp_path, "\n".join(map(json.dumps, lines)), "step 1 loss 9")
    assert found == Reported(2.5, 3.5, 248, None, 0.1, (Point(1, 3.0, 64, 0.1),))


@pytest.mark.parametrize(
    ("printed", "final", "points"),
    [
        ("step 3/98 | loss 5.12 | lr 3e-4 | 12 tokens/s", 5.12, [Point(3, 5.12, None, 3e-4)]),
        ("iter 10: loss 3.25, time 90.1ms, mfu 1.0%", 3.25, [Point(10, 3.25)]),
        ("Step: 7 train loss: nan", math.nan, [Point(7, math.nan)]),
        ("iteration 5 of 9 ... loss = .5 learning rate: 1e-2", 0.5, [Point(5, 0.5, None, 0.01)]),
        ("{'loss': '3.6', 'learning_rate': '0.006'}\n{'train_loss': 3.5}", 3.5, []),
        ('{"loss": 3.5, "step": 2}\nnoise {\n{"a": ', 3.5, [Point(2, 3.5)]),
        ("stepping stones 3, lossless 4", None, []),
        ("the loss fell in 3 steps", None, []),
        ("{[()]}\n" + "{" * 100_000, None, []),
    ],
)
def test_what_scripts_print(tmp_path: Path, printed: str, final: float | None, points: list[Point]) -> None:
    found = read(tmp_path, None, f"Loading\n{printed}\ndone\n")
    assert repr((found.final_loss, list(found.points))) == repr((final, points))


def test_a_file_of_one_object_over_several_lines(tmp_path: Path) -> None:
    found = read(tmp_path, json.dumps({"final_loss": 2.5, "tokens": 248.0}, indent=2))
    assert (found.final_loss, found.tokens) == (2.5, 248)
    assert read(tmp_path, "\x00\xff not text") == Reported()


def test_steps_alone_say_how_many_tokens(tmp_path: Path) -> None:
    assert (
        read(tmp_path, '{"step": 1, "loss": 2, "tokens": 64}\n{"step": 2, "loss": 1, "tokens": 128}').tokens
        == 128
    )


def test_a_curve_has_its_last_point_and_the_planned_tokens_where_none_are_reported() -> None:
    assert curve_of([Point(5, 3.0), Point(6, math.inf), Point(8, 2.0)], VALUES) == ((64, 3.0), (248, 2.0))
    many = [Point(step, float(step), step) for step in range(1, 12_346)]
    thinned = curve_of(many, VALUES)
    assert len(thinned) <= MOST_POINTS and thinned[-1] == (12_345, 12_345.0)


def optimizer(steps: int, last_at: int, *highest: float) -> dict[str, Any]:
    return {"steps": steps, "last_at": last_at, "groups": [{"highest": rate} for rate in highest]}


def test_of_several_optimizers_those_count_that_step_to_the_end() -> None:
    probes, one, other = optimizer(9, 9, 0.5), optimizer(4, 16, 0.1), optimizer(4, 17, 0.2, 0.3)
    assert observed_of([probes, one, other]) == Observed(4, (0.1, 0.2, 0.3), 9)
    assert observed_of([]) == Observed(None, ())


CHECKPOINT = (1e-3, 2e-3)


@pytest.mark.parametrize(
    ("rates", "others", "begins"),
    [
        ((1e-3,), [], "rate overwritten by the checkpoint: it trained at 0.001"),
        ((1e-3, 2e-3), [], "rate overwritten by the checkpoint: it trained at 0.002"),
        ((4e-3,), [], None),
        ((4e-3 * 1.0005,), [], None),  # as printed in three digits
        ((1e-3, 4e-3), [], None),  # one group has a rate of its own
        ((2e-3, 8e-3), [], None),  # multiples of the planned one, of which one happens to be the checkpoint's
        ((3e-3,), [Rate(1, 1e-3, 3e-3)], "rate does not follow the plan: it trained at 0.003 as k=1 did"),
        ((3e-3,), [Rate(1, 4e-3, 3e-3)], None),  # planned alike
        ((3e-3,), [Rate(1, 1e-3, 7.5e-4)], None),  # the same share of the plan
        ((), [], None),
    ],
)
def test_rates(rates: tuple[float, ...], others: list[Rate], begins: str | None) -> None:
    found = wrong(VALUES, Observed(4, rates), Reported(), CHECKPOINT, others)
    assert found is None if begins is None else (found or "").startswith(begins)


def test_fewer_steps_or_another_rate_are_notes() -> None:
    found = notes(VALUES, Observed(3, (3e-3,)), Reported(final_loss=1.0, tokens=248))
    assert found == [
        "the highest rate was 0.003, planned is 0.004",
        "3 optimizer steps, planned are 4",
    ]


@pytest.mark.parametrize(
    ("steps", "planned", "wrong_ones"),
    [(4, 8, True), (5, 8, False), (16, 31, True), (2, 3, False), (1, 2, True), (1, 1, False)],
)
def test_half_of_the_steps_for_all_tokens(steps: int, planned: int, wrong_ones: bool) -> None:
    values = {**VALUES, "num_steps": planned}
    found = wrong(values, Observed(steps, ()), Reported(tokens=248), (), [])
    assert (found or "").startswith(f"{steps} optimizer steps for all 248 tokens") == wrong_ones
    assert wrong(values, Observed(steps, ()), Reported(), (), []) is None  # it may have ended early
    assert wrong(values, Observed(steps, (), planned), Reported(tokens=248), (), []) is None  # as of a GAN


def test_what_is_reported_stands_in_for_what_was_not_seen() -> None:
    found = wrong(VALUES, Observed(None, ()), Reported(highest_rate=1e-3), CHECKPOINT, [])
    assert found is not None and found.startswith("rate overwritten by the checkpoint")
