"""``-p tests.planted.plug_broken_train``: the shipped auto-batch tests, each with what it has to catch."""

from __future__ import annotations

from pathlib import Path

import pytest

from pytest_gputrain.checks import auto_batch_trials

SCRIPT = Path(__file__).parent / "scripts" / "train_broken.py"
PLANTED = {
    "test_single_device": ["margin_ignored", "half_of_the_memory"],
    "test_two_ranks": ["ranks_disagree"],
    "test_four_ranks": ["every_rank_for_itself"],
    "test_manual_against_auto": ["loss_not_divided", "total_ignored"],
    "test_override": ["given_size_ignored"],
    "test_disabled": ["searches_unasked"],
    "test_cache_miss": ["stale_answer"],
    "test_cache_hit": ["cache_never_read"],
    "test_cache_invalidation": ["key_of_everything"],
    "test_model_too_large_for_batch_1": ["too_large_swallowed"],
    "test_out_of_memory_in_the_optimizer_step_only": ["optimizer_not_probed"],
    "test_out_of_memory_in_evaluation_only": ["evaluation_not_probed"],
    "test_out_of_memory_on_one_rank_only": ["first_ranks_memory_only"],
    "test_throughput_comparison": ["smallest"],
}  # fmt: skip


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    metafunc.parametrize("planted", PLANTED[metafunc.function.__name__], indirect=True)


@pytest.fixture(autouse=True)
def planted(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Break the script; forget what other tests have run, except for the peaks that they measured."""
    monkeypatch.setenv("PLANTED_TRAIN", request.param)
    monkeypatch.setattr(auto_batch_trials, "SCRIPT", SCRIPT)
    done = request.getfixturevalue("trials").done
    for key in [key for key in done if not any(auto_batch_trials.AMPLE in one for one in key[2])]:
        del done[key]
