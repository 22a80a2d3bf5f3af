"""Saved by ranks, loaded by one process, and back."""

from __future__ import annotations

from tests.tensor_parallel import models
from tests.tensor_parallel.ranks import on_two_ranks


def test_weights_survive_resharding_both_ways() -> None:
    record = on_two_ranks("compare_checkpoint", models.by_plan)
    assert record.problem is None
    assert record.to_one == record.to_ranks == 37
    assert record.saved_bytes > 4 * 7936


def test_parts_cut_by_hand_cannot_be_resharded_and_are_told() -> None:
    record = on_two_ranks("compare_checkpoint", models.by_hand)
    assert record.skipped == (
        "the case's state_dict gives plain parts, such as (8, 16) of (16, 16) for "
        "blocks.0.attention.q.weight, which no checkpoint can join: give DTensors, or a state_dict "
        "that joins them"
    )
