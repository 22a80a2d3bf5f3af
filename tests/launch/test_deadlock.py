"""The analysis is pure: simulated ranks run to a standstill, and the planted culprit is named."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pytest_gputrain.launch import blame, deadlock
from pytest_gputrain.launch.deadlock import Call, Scene

Step = tuple[str, int, str]
"""Operation, number of elements, line."""


def call(seq: int, step: Step, size: int, *, group: str = "0", waiting: bool = False) -> Call:
    op, elements, line = step
    return Call(seq, op, ((elements,),), ("float32",), group, tuple(range(size)), waiting, f"{line} in train")


def standstill(programs: Sequence[Sequence[Step]], asleep: dict[int, int] | None = None) -> dict[int, Scene]:
    """Runs synchronous ranks until none can go on. ``asleep``: the step before which a rank falls asleep."""
    size, asleep = len(programs), asleep or {}
    done = 0
    while True:
        steps = [p[done] if done < len(p) and asleep.get(r) != done else None for r, p in enumerate(programs)]
        if None in steps or len({(s[0], s[1]) for s in steps if s}) > 1:
            break
        done += 1
    scenes = {}
    for rank, (program, step) in enumerate(zip(programs, steps, strict=True)):
        calls = [call(seq + 1, program[seq], size) for seq in range(done)]
        if step is not None:
            calls.append(call(done + 1, step, size, waiting=True))
            scenes[rank] = Scene(rank, "running", True, calls[-1].location, calls=calls)
        elif asleep.get(rank) == done:
            scenes[rank] = Scene(rank, "running", False, "t.py:99 in load", calls=calls)
        else:
            scenes[rank] = Scene(rank, "returned", location="t.py:100 in train", calls=calls)
    return scenes


OPERATIONS = st.sampled_from(["all_reduce", "broadcast", "all_gather"])
PROGRAMS = st.lists(st.tuples(OPERATIONS, st.integers(1, 3)), min_size=2, max_size=8).map(
    lambda steps: [(op, size, f"t.py:{line}") for line, (op, size) in enumerate(steps)]
)
FAULTS = ("returns early", "sleeps", "other operation", "other size", "skips one", "one more")


def faulty(program: list[Step], fault: str, at: int) -> list[Step]:
    op, size, line = program[at]
    if fault == "returns early":
        return program[:at]
    if fault == "other operation":
        return [*program[:at], ("reduce", size, "t.py:77"), *program[at + 1 :]]
    if fault == "other size":
        return [*program[:at], (op, size + 5, line), *program[at + 1 :]]
    if fault == "skips one":
        return [*program[:at], *program[at + 1 :]]
    return [*program[:at], ("barrier", 0, "t.py:88"), *program[at:]] if fault == "one more" else program


@settings(max_examples=200, deadline=None)
@given(PROGRAMS, st.integers(3, 6), st.sampled_from(FAULTS), st.data())
def test_the_planted_culprit_is_named(program: list[Step], size: int, fault: str, data: Any) -> None:
    culprit = data.draw(st.integers(0, size - 1))
    at = data.draw(st.integers(0, len(program) - 1))
    programs = [faulty(program, fault, at) if rank == culprit else program for rank in range(size)]
    scenes = standstill(programs, {culprit: at} if fault == "sleeps" else None)
    found = blame.explain(scenes)
    assert found is not None and found.cause.rank == culprit
    assert f"rank {culprit}" in str(found.cause)
    blocked = {rank for rank, scene in scenes.items() if scene.blocked}
    stuck = deadlock.stuck(scenes)
    assert stuck == ({} if fault == "sleeps" else dict.fromkeys(blocked, True))


@settings(max_examples=100, deadline=None)
@given(PROGRAMS, st.integers(2, 5), st.data())
def test_a_rank_that_may_yet_come_frees_all_that_wait_for_it(
    program: list[Step], size: int, data: Any
) -> None:
    at = data.draw(st.integers(0, len(program) - 1))
    late = data.draw(st.sets(st.integers(0, size - 1), min_size=1))
    assert deadlock.stuck(standstill([program] * size, dict.fromkeys(late, at))) == {}


def test_a_collective_that_all_have_entered_may_yet_complete() -> None:
    step = ("all_reduce", 4, "t.py:1")
    scenes = {
        rank: Scene(rank, blocked=True, location="t.py:1 in train", calls=[call(1, step, 2, waiting=True)])
        for rank in range(2)
    }
    assert deadlock.stuck(scenes) == {}
    assert blame.explain(scenes) is None


def two_groups(size: int, odd: int) -> dict[int, Scene]:
    scenes = {}
    for rank in range(size):
        mine = call(
            1, ("all_reduce", 4, f"t.py:{rank}"), size, group="2" if rank == odd else "1", waiting=True
        )
        scenes[rank] = Scene(rank, blocked=True, location=mine.location, calls=[mine])
    return scenes


def test_two_groups_in_opposite_order_is_certain_and_blames_neither_of_two() -> None:
    scenes = two_groups(2, odd=1)
    assert deadlock.stuck(scenes) == {0: True, 1: True}
    found = blame.explain(scenes)
    assert found is not None and (found.cause.rank, found.cause.kind) == (None, "groups")
    assert found.cause.message == (
        "ranks wait for each other: rank 1 in all_reduce #1 of group 2 (4 x float32) at t.py:1 in train, "
        "rank 0 in all_reduce #1 of group 1 (4 x float32) at t.py:0 in train"
    )


def test_of_four_the_one_in_the_other_group_is_named() -> None:
    found = blame.explain(two_groups(4, odd=2))
    assert found is not None and found.cause.rank == 2


def test_the_words_for_a_rank_that_returned() -> None:
    program: list[Step] = [("all_reduce", 128, "train.py:57")] * 4
    found = blame.explain(standstill([program, program[:3]]))
    assert found is not None
    assert str(found.cause) == (
        "rank 1 never reached all_reduce #4 (128 x float32); it returned from the function   "
        "at t.py:100 in train"
    )
    assert found.advice == (
        "ranks ran a different number of steps (calls at this line: rank 0: 4, rank 1: 3); give every rank "
        "the same number of batches, or use torch.distributed.algorithms.Join"
    )


def test_an_exception_that_only_one_rank_handles_is_the_reason() -> None:
    scenes = standstill([[("all_reduce", 8, "t.py:5")], [("barrier", 0, "t.py:9")]])
    scenes[1].handles = "RuntimeError: no shard (t.py:3 in load)"
    found = blame.explain(scenes)
    assert found is not None and found.cause.rank is None
    assert "; rank 1 is handling RuntimeError: no shard (t.py:3 in load)   at" in str(found.cause)
    assert found.advice == (
        "rank 1 came there by an exception of which the other ranks know nothing: mend what raised it; a "
        "collective in except or finally is one that the others do not call"
    )
    scenes[0].handles = scenes[1].handles
    found = blame.explain(scenes)
    assert found is not None and "handling" not in str(found.cause) + found.advice


def test_an_exception_handled_beside_the_culprit_is_said_and_not_blamed() -> None:
    program: list[Step] = [("all_reduce", 8, "t.py:5")]
    scenes = standstill([program, program], {1: 0})
    scenes[0].handles = "ImportError"
    found = blame.explain(scenes)
    assert found is not None and found.cause.rank == 1
    assert "; rank 0 is handling ImportError" in found.cause.message and "busy" in found.advice


def test_other_sizes_from_other_lines_are_other_calls() -> None:
    backward, log = ("all_reduce", 40, "t.py:5"), ("all_reduce", 1, "t.py:9")
    found = blame.explain(standstill([[backward, backward], [backward, log]]))
    assert found is not None and found.cause.kind == "mismatch"
    assert str(found.cause) == (
        "rank 1 called all_reduce #2 with 1 x float32 where rank 0 had 40 x float32 [t.py:5 in train]   "
        "at t.py:9 in train"
    )
    assert found.advice.startswith("only some ranks come to t.py:9 in train (all_reduce)")


def test_of_a_rank_that_died_what_backward_called_is_not_known() -> None:
    bucket, extra = ("all_reduce", 40, "t.py:5"), ("all_reduce", 4, "t.py:2")
    scenes = standstill([[extra, bucket], [extra, extra]])
    noted = [call._replace(note="in backward") if call.seq == 2 else call for call in scenes[0].calls]
    scenes[0].calls, scenes[1].complete = noted, False
    found = blame.explain(scenes)
    assert (
        found is not None and "only some ranks" not in found.advice and "a call more or less" in found.advice
    )


def test_the_words_for_sizes_that_differ() -> None:
    program: list[Step] = [("all_reduce", 128, "train.py:57")]
    found = blame.explain(standstill([program, [("all_reduce", 64, "train.py:57")], program]))
    assert found is not None
    assert str(found.cause) == (
        "rank 1 called all_reduce #1 with 64 x float32 where ranks 0, 2 had 128 x float32   "
        "at train.py:57 in train"
    )


@pytest.mark.parametrize("guest", [0, 1])
def test_of_two_ranks_the_one_at_a_line_that_only_it_knows_is_at_the_cause(guest: int) -> None:
    loop: list[Step] = [("broadcast", 8, "t.py:18"), ("all_reduce", 72, "t.py:19")] * 3
    other = [*loop[:4], ("barrier", 0, "t.py:23"), *loop[4:]]
    found = blame.explain(standstill([other, loop] if guest == 0 else [loop, other]))
    assert found is not None
    assert str(found.cause) == (
        f"rank {guest} called barrier #5 (0 x float32) where rank {1 - guest} called broadcast #5 "
        "(8 x float32) [t.py:18 in train]   at t.py:23 in train"
    )
    assert found.advice.startswith("only some ranks come to t.py:23 in train (barrier)")


def test_of_two_new_lines_the_users_own_call_is_at_the_cause() -> None:
    mine, ddps = Call(1, "all_reduce", location="t.py:7 in f"), Call(1, "broadcast", location="t.py:3 in f")
    ddps = ddps._replace(note="DDP's buffers")
    for calls in ((mine, ddps), (ddps, mine)):
        both = [call._replace(ranks=(0, 1), waiting=True) for call in calls]
        scenes = {r: Scene(r, blocked=True, location=both[r].location, calls=[both[r]]) for r in (0, 1)}
        found = blame.explain(scenes)
        assert found is not None and found.cause.location == "t.py:7 in f"
        assert "[t.py:3 in f]" in found.cause.message


def test_ranks_that_shifted_against_each_other_parted_where_their_lines_first_differ() -> None:
    loop: list[Step] = [("all_reduce", 1, f"t.py:{line}") for line in (1, 2, 1, 2, 1, 2)]
    found = blame.explain(standstill([loop, [loop[0], *loop[2:]]]))
    assert found is not None
    assert "they parted at all_reduce #2, called at t.py:2 in train and at t.py:1 in train" in found.advice


def test_a_rank_that_failed_in_the_making_of_a_group_did_come_there() -> None:
    line = "t.py:7 in setup"
    waits = Scene(0, blocked=True, waits_in="init_process_group", location=line)
    assert blame.explain({0: waits, 1: Scene(1, "raised", location=line)}) is None
    found = blame.explain({0: waits, 1: Scene(1, "raised", location="t.py:5 in setup")})
    assert found is not None and found.cause.message == (
        "rank 1 never reached init_process_group, in which rank 0 waits; it raised an exception"
    )


def test_a_group_that_was_made_anew_counts_from_one() -> None:
    record = {"op": "barrier", "sizes": [], "dtypes": [], "group": "0", "ranks": [0, 1], "state": "done",
              "location": None}  # fmt: skip
    calls = deadlock.from_json([{**record, "seq": seq} for seq in (1, 2, 3, 1, 2)])
    assert [call.seq for call in calls] == [1, 2]


@pytest.mark.parametrize("fault", ["returns early", "other size"])
def test_64_ranks_of_2000_collectives(fault: str) -> None:
    program: list[Step] = [("all_reduce", 1 + n % 7, f"t.py:{n % 50}") for n in range(2000)]
    scenes = standstill([faulty(program, fault, 1999) if rank == 17 else program for rank in range(64)])
    began = time.monotonic()
    assert len(deadlock.stuck(scenes)) in (63, 64)
    found = blame.explain(scenes)
    assert time.monotonic() - began < 20  # benchmarks/deadlock_analysis.py has the figure
    assert found is not None and found.cause.rank == 17


def test_a_rank_that_is_stuck_within_its_backward_is_the_one_to_look_at() -> None:
    scenes = standstill([[("all_reduce", 3, "t.py:1")]] * 2, asleep={1: 0})
    scenes[1].waits_in = deadlock.BACKWARD
    found = blame.explain(scenes)
    assert found is not None
    assert found.cause.rank == 1
    assert found.cause.message == (
        "rank 1 never reached all_reduce #1 (3 x float32); it is still in backward, and waits for no other "
        "rank"
    )
    assert found.advice.startswith("an operation or a hook of its backward that does not return")
    assert blame.fate(scenes[1]).startswith("is in backward after 0 collectives")
