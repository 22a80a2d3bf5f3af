"""The verdict is pure: what is known about the ranks in, verdict and cause out."""

from __future__ import annotations

import pickle
import traceback
from typing import Any

import pytest

from pytest_gputrain.launch import Cause, RankError, RankResult, Verdict, stacks
from pytest_gputrain.launch.verdict import Ending, judge

CLOSED = RankError("RuntimeError", "Connection closed by peer [127.0.0.1]:1", "", "train.py:57 in step")
TIMEOUT = RankError(
    "RuntimeError", "Timed out waiting 5000ms for recv operation to complete", "", "t.py:9 in f"
)
BOOM = RankError("ValueError", "boom", "", "train.py:42 in step")
SKIP = RankError("Skipped", "no data set", "", "train.py:3 in step")


def rank(number: int, state: Any, seconds: float = 1.0, **more: Any) -> RankResult:
    return RankResult(number, state, seconds=seconds, **more)


def verdict_of(*ranks: RankResult, ending: Ending = "failure") -> tuple[Verdict, Cause]:
    verdict, cause = judge(ranks, ending, seconds=2.0)
    assert cause is not None
    return verdict, cause


def test_only_all_ranks_passing_is_green() -> None:
    assert judge([rank(0, "passed"), rank(1, "passed")], "complete", seconds=1) == (Verdict.PASSED, None)


@pytest.mark.parametrize("other", ["failed", "crashed", "skipped", "ended"])
@pytest.mark.parametrize("ending", ["complete", "failure", "deadline", "stalled", "deserted", "deadlocked"])
def test_one_other_state_beside_a_pass_is_never_green(other: Any, ending: Ending) -> None:
    verdict, cause = judge([rank(0, "passed"), rank(1, other)], ending, seconds=1)
    assert verdict not in (Verdict.PASSED, Verdict.SKIPPED)
    assert cause is not None and str(cause)


def test_no_rank_at_all_is_not_green() -> None:
    assert judge([], "complete", seconds=1)[0] is Verdict.FAILED


def test_all_skipping_is_skipped_with_the_reason() -> None:
    verdict, cause = verdict_of(
        rank(0, "skipped", error=SKIP), rank(1, "skipped", error=SKIP), ending="complete"
    )
    assert (verdict, cause.message) == (Verdict.SKIPPED, "no data set")


def test_the_earliest_own_error_is_the_cause_and_names_its_line() -> None:
    verdict, cause = verdict_of(rank(0, "failed", 0.9, error=CLOSED), rank(1, "failed", 1.0, error=BOOM))
    assert verdict is Verdict.FAILED
    assert str(cause) == "rank 1 raised ValueError: boom   at train.py:42 in step"


def test_a_death_comes_before_its_echo_even_if_seen_later() -> None:
    verdict, cause = verdict_of(
        rank(0, "failed", 0.9, error=CLOSED), rank(1, "crashed", 1.1, signal="SIGKILL")
    )
    assert (verdict, cause.rank) == (Verdict.CRASHED, 1)
    assert cause.message == "rank 1 was killed by SIGKILL"


def test_leaving_with_exit_code_0_is_a_crash() -> None:
    verdict, cause = verdict_of(rank(0, "passed"), rank(1, "crashed", exit_code=0))
    assert verdict is Verdict.CRASHED
    assert cause.message == "rank 1 left with exit code 0 before it was done (os._exit?)"


def test_a_parameter_that_ddp_waited_for_is_named_in_the_first_line() -> None:
    said = (
        "Expected to have finished reduction in the prior iteration before starting a new one. This error "
        "indicates that ...\n"
    )
    numbers = "Parameter indices which did not receive grad for rank 1: 2 3"
    names = "Parameters which did not receive grad for rank 1: aux_head.bias, aux_head.weight\n"
    assert RankError("RuntimeError", said + names + numbers, "").headline == (
        "RuntimeError: no gradient in the last step for aux_head.bias, aux_head.weight (DDP waited for them)"
    )
    assert RankError("RuntimeError", said + numbers, "").headline == (
        "RuntimeError: no gradient in the last step for parameter 2, parameter 3 (DDP waited for them)"
    )
    assert RankError("RuntimeError", said, "").headline == f"RuntimeError: {said.strip()}"


def test_only_echoes_blame_the_rank_that_had_left() -> None:
    verdict, cause = verdict_of(rank(0, "failed", 1.0, error=CLOSED), rank(1, "passed", 0.5))
    assert (verdict, cause.rank, cause.kind) == (Verdict.FAILED, 1, "left")
    assert cause.message.startswith("rank 1 had finished while rank 0 needed it")


def test_one_that_closed_its_group_had_left_even_if_it_reports_later() -> None:
    _, cause = verdict_of(rank(0, "failed", 1.0, error=CLOSED), rank(1, "passed", 1.2), ending="complete")
    assert (cause.rank, cause.kind) == (1, "left")
    _, cause = verdict_of(rank(0, "failed", 1.0, error=TIMEOUT), rank(1, "passed", 1.2), ending="complete")
    assert cause.rank == 0  # it waited for something else


def test_a_group_timeout_is_a_hang_blamed_on_the_absent_rank() -> None:
    verdict, cause = verdict_of(rank(0, "failed", error=TIMEOUT), rank(1, "ended", waiting_at="t.py:3 in g"))
    assert (verdict, cause.rank) == (Verdict.HUNG, 1)
    assert "waited in vain for rank 1 at t.py:3 in g" in cause.message


def test_waiting_for_a_rank_that_returned_is_hung() -> None:
    waiting = rank(0, "ended", waiting_at="train.py:57 in step", in_collective=True)
    verdict, cause = verdict_of(waiting, rank(1, "passed"), ending="deserted")
    assert (verdict, cause.rank) == (Verdict.HUNG, 1)
    assert str(cause) == (
        "rank 1 had finished while rank 0 waits for it in a collective   at train.py:57 in step"
    )


def test_the_deadline_with_movement_is_timed_out_and_names_who_holds_up() -> None:
    waits = rank(0, "ended", waiting_at="a.py:1 in f", in_collective=True)
    works = rank(1, "ended", waiting_at="a.py:9 in g", moving=True)
    verdict, cause = verdict_of(waits, works, ending="deadline")
    assert (verdict, cause.rank, cause.location) == (Verdict.TIMED_OUT, 1, "a.py:9 in g")


def test_the_deadline_without_movement_is_hung() -> None:
    waits = rank(0, "ended", in_collective=True)
    sleeps = rank(1, "ended", waiting_at="a.py:9 in g")
    verdict, cause = verdict_of(waits, sleeps, ending="deadline")
    assert (verdict, cause.rank, cause.kind) == (Verdict.HUNG, 1, "stuck")


def test_all_waiting_in_collectives_is_a_deadlock_of_no_single_rank() -> None:
    ranks = [rank(n, "ended", in_collective=True, waiting_at=f"a.py:{n} in f") for n in range(2)]
    verdict, cause = verdict_of(*ranks, ending="stalled")
    assert (verdict, cause.rank, cause.kind) == (Verdict.HUNG, None, "deadlock")


def test_a_skip_beside_a_pass_is_failed() -> None:
    verdict, cause = verdict_of(rank(0, "skipped", error=SKIP), rank(1, "passed"), ending="complete")
    assert verdict is Verdict.FAILED
    assert cause.message == ("rank 0 skipped (no data set) while rank 1 ran: skip on all ranks or on none")


def test_a_skip_beside_a_failure_blames_the_failure() -> None:
    verdict, cause = verdict_of(rank(0, "skipped", 0.1, error=SKIP), rank(1, "failed", 0.2, error=BOOM))
    assert (verdict, cause.rank) == (Verdict.FAILED, 1)


def test_an_exception_in_a_data_loaders_worker_is_the_one_to_read() -> None:
    def load(index: int) -> None:
        raise KeyError(f"sample {index}\nhas no label")

    try:
        load(3)
    except KeyError as error:
        text = "".join(traceback.format_exception(error))
    message = f"Caught KeyError in DataLoader worker process 1.\nOriginal {text}"
    assert RankError("KeyError", message, "").headline == (
        "KeyError: 'sample 3\\nhas no label' (in DataLoader worker process 1)"
    )
    where = stacks.told_location(message)
    assert where is not None
    assert where.endswith(" in load")
    assert "test_verdict.py:" in where


def test_headlines_are_one_line_and_bounded() -> None:
    error = RankError("ValueError", "first\nsecond", "")
    assert error.headline == "ValueError: first"
    assert len(RankError("E", "x" * 10_000, "").headline) == 300


def test_records_survive_pickling() -> None:
    for record in (Cause(1, "exit", "m", "l"), BOOM, rank(0, "passed"), Verdict.HUNG):
        assert pickle.loads(pickle.dumps(record)) == record
