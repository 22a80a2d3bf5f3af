"""``-p tests.planted.plug_broken_compile``: the shipped tests of compiled training, each with what it has to
catch.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from pytest_gputrain.checks import auto_batch_trials

SCRIPT = Path(__file__).parent / "scripts" / "train_broken_compile.py"
PLANTED = {
    "test_stays_compiled": ["not_compiled", "wrapped_and_eager", "short_micro_batches", "evaluates_compiled"],
    "test_same_losses": ["other_weights", "rows_that_fill_up_count"],
    "test_checkpoints": ["saves_the_wrapper", "loads_nothing"],
    "test_fine_tuning_on_documents": ["pads_to_the_longest"],
    "test_two_ranks": ["second_rank_not_compiled"],
    "test_batch_size_found": ["forgets_what_compile_returns"],
    "test_inductor_on_a_cpu": ["not_compiled"],
}  # fmt: skip


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    metafunc.parametrize("planted", PLANTED[metafunc.function.__name__], indirect=True)


@pytest.fixture(autouse=True)
def planted(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Break the script; forget what other tests have run."""
    monkeypatch.setenv("PLANTED_TRAIN", request.param)
    monkeypatch.setattr(auto_batch_trials, "SCRIPT", SCRIPT)
    request.getfixturevalue("trials").done.clear()
