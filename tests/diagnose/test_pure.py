"""The pure parts beside the tree: phases, bisection, parity, outcomes, environment, readings."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pytest_gputrain.diagnose import environment, parity, readings
from pytest_gputrain.diagnose.bisect import smallest_failing
from pytest_gputrain.diagnose.outcome import phase_result
from pytest_gputrain.diagnose.phases import NAMES, Given, family, plan, with_branches
from pytest_gputrain.diagnose.records import Missing, Outcome, Phase
from pytest_gputrain.launch.records import Cause, Verdict


def test_the_phases_of_a_script() -> None:
    phases = {phase.name: phase for phase in plan(Given("script"))}
    assert tuple(phases) == NAMES
    assert [phases[name].steps for name in ("ddp_one_step", "ddp_steps", "ddp_whole")] == [1, 3, None]
    skipped = {name: phase.skip for name, phase in phases.items() if phase.skip}
    assert skipped == {
        "gloo": "the phases above ran on gloo already",
        "branches": "the model declares no branches",
    }
    accusing = {name for name, phase in phases.items() if phase.accuses}
    assert accusing == {"ddp_one_step", "ddp_steps", "ddp_whole", "gloo", "branches"}


def test_the_phases_of_a_case_on_nccl() -> None:
    given_case = Given(
        "case", backend="nccl", ranks=4, branches=("x", "y"), checkpointing=True, layers=(2, 4)
    )
    phases = {phase.name: phase for phase in plan(given_case)}
    assert phases["gloo"].switches == {"GPUTRAIN_BACKEND": "gloo"} and not phases["gloo"].skip
    assert phases["branch:y"].switches["GPUTRAIN_FORCE_BRANCH"] == "y"
    assert phases["checkpointing"].switches["GPUTRAIN_GC_RANGE"] == "2:4"
    assert phases["checkpointing"].accuses
    assert (phases["single"].ranks, phases["ddp_steps"].ranks) == (1, 4)


def test_chosen_phases_accuse() -> None:
    phases = plan(Given("script", branches=("x",)), ["branches", "static_graph"])
    assert [(phase.name, phase.accuses) for phase in phases] == [("branch:x", True), ("static_graph", True)]


def test_branches_that_are_found_on_the_way() -> None:
    found = with_branches(plan(Given("script")), Given("script"), ["x", "y"])
    assert [phase.name for phase in found][4:6] == ["branch:x", "branch:y"]
    assert {family(phase.name) for phase in found} == set(NAMES)


@given(st.integers(1, 30), st.data())
def test_bisection_finds_the_layer(layers: int, data: st.DataObject) -> None:
    bad = data.draw(st.integers(0, layers - 1))
    asked: list[tuple[int, int]] = []

    def fails(part: tuple[int, int]) -> bool:
        asked.append(part)
        return part[0] <= bad < part[1]

    assert smallest_failing((0, layers), fails) == (bad, bad + 1)
    assert len(asked) == len(set(asked)) <= 2 * layers.bit_length()


@given(st.integers(2, 20), st.data())
def test_bisection_finds_layers_that_fail_together(layers: int, data: st.DataObject) -> None:
    low, high = sorted(data.draw(st.sets(st.integers(0, layers - 1), min_size=2, max_size=2)))
    assert smallest_failing((0, layers), lambda part: part[0] <= low and high < part[1]) == (low, high + 1)


def test_parity_tells_the_first_step_and_the_worst_parameter() -> None:
    one: list[parity.Gradients] = [
        {"a": [1.0, 1.0, 1.0], "b": [2.0, 1.0, 1.0]},
        {"a": [9.0, 1.0, 1.0], "b": None},
    ]
    same: list[parity.Gradients] = [
        {"a": [1.0, 1.0, 1.0], "b": [2.0, 1.0, 1.0]},
        {"a": [9.0, 1.0, 1.0], "b": [1.0, 0.0, 0.0]},
    ]
    assert parity.worst_difference(one, one) is None
    assert parity.worst_difference(one, same) == parity.Difference(2, "b", 1.0, 1)
    negligible = [{"a": [1.0, 1.0, 1.0], "b": [1e-9, 0.0, 1e-9]}]
    assert parity.worst_difference(negligible, [{**negligible[0], "b": [1e-9, 1e-9, 0.0]}]) is None
    nan = [{"a": [float("nan")] * 3}]
    assert parity.worst_difference(nan, nan) is None
    assert parity.worst_difference(nan, [{"a": [1.0, 1.0, 1.0]}]) is not None


STEPS = Phase("ddp_steps", "", "program", 2, 3)
WHOLE = Phase("ddp_whole", "", "program", 2, None)


def told(*durations: float) -> dict[int, dict[str, object]]:
    times = [sum(durations[: count + 1]) for count in range(len(durations))]
    return {rank: {"began": 0.0, "steps": times, "backend": "gloo", "asked": "nccl"} for rank in (0, 1)}


SLOW = Cause(1, "slow", "rank 1 was still running after 60.0 s", "train.py:9 in step")


@pytest.mark.parametrize(
    ("phase", "verdict", "cause", "durations", "outcome"),
    [
        (STEPS, Verdict.PASSED, None, (1.0, 0.1, 0.1), Outcome.PASS),
        (STEPS, Verdict.PASSED, None, (70.0, 0.1, 0.1), Outcome.PASS),  # the first compiles
        (STEPS, Verdict.PASSED, None, (20.0, 20.0, 20.0), Outcome.PASS),
        (STEPS, Verdict.PASSED, None, (0.1, 0.1, 0.1, 20.0), Outcome.SLOW),
        (STEPS, Verdict.TIMED_OUT, SLOW, (20.0, 20.0), Outcome.SLOW),
        (WHOLE, Verdict.TIMED_OUT, SLOW, (20.0, 20.0), Outcome.PASS),
        (WHOLE, Verdict.TIMED_OUT, SLOW, (), Outcome.SLOW),
        (STEPS, Verdict.HUNG, Cause(0, "stuck", "stuck"), (1.0,), Outcome.HANG),
        (STEPS, Verdict.CRASHED, Cause(0, "signal", "killed"), (), Outcome.CRASH),
        (STEPS, Verdict.FAILED, Cause(0, "exception", "raised"), (), Outcome.FAIL),
        (STEPS, Verdict.SKIPPED, Cause(0, "skip", "no"), (), Outcome.SKIPPED),
    ],
)
def test_what_a_launch_makes_of_a_phase(
    phase: Phase, verdict: Verdict, cause: Cause | None, durations: tuple[float, ...], outcome: Outcome
) -> None:
    result = phase_result(phase, verdict, cause, told(*durations), seconds=60.0)
    assert result.outcome is outcome
    assert result.finished == (verdict is not Verdict.TIMED_OUT)
    assert bool(result.cause) == (outcome is not Outcome.PASS)


def test_where_the_time_goes() -> None:
    result = phase_result(STEPS, Verdict.TIMED_OUT, SLOW, {0: told(20.0, 21.5)[0]}, seconds=60.0)
    assert result.profile == "steps of rank 0 took 20.0, 21.5 s; at the end it was at train.py:9 in step"
    long = phase_result(WHOLE, Verdict.TIMED_OUT, SLOW, told(20.0, 20.0), seconds=60.0)
    assert long.notes == ("still training at the deadline: 2 steps in 60 s, not to its end",)


def test_debugging_is_set_and_the_users_values_win() -> None:
    users = {"NCCL_DEBUG": "WARN", "HOME": "/secret", "AWS_SECRET": "x", "CUDA_VISIBLE_DEVICES": "1"}
    on_top = environment.added(users, {"GPUTRAIN_DDP_STATIC_GRAPH": "1"}, device="cuda")
    assert "NCCL_DEBUG" not in on_top and "CUDA_VISIBLE_DEVICES" not in on_top
    assert on_top["TORCH_DISTRIBUTED_DEBUG"] == "INFO"  # DETAIL segfaults with DDP on gloo
    assert on_top["TORCH_NCCL_DUMP_ON_TIMEOUT"] == "1"
    recorded = environment.recorded(users, on_top)
    assert recorded["NCCL_DEBUG"] == "WARN" and recorded["GPUTRAIN_DDP_STATIC_GRAPH"] == "1"
    assert not {"HOME", "AWS_SECRET"} & set(recorded)
    on_cpu = environment.added({}, {}, device="cpu")
    assert (on_cpu["CUDA_VISIBLE_DEVICES"], on_cpu["GPUTRAIN_BACKEND"]) == ("", "gloo")
    assert "NCCL_DEBUG" not in on_cpu


TRACES = """[DDP] rank={rank} bucket_elems=1024 dtype=torch.float32
[GRAD-TRACE] after_backward_step1 arrived=190 missing=2
  - MISSING: blocks.4.attn.gate_mlp.weight
  - MISSING: head
[GRAD-TRACE] after_backward_step2 arrived=191 missing=1
  - MISSING: blocks.4.attn.gate_mlp.weight
"""


def test_missing_parameters_and_buckets_are_read_from_the_traces(tmp_path: Path) -> None:
    for rank in (0, 1):
        (tmp_path / f"rank{rank}").mkdir()
        (tmp_path / f"rank{rank}" / "traces.log").write_text(TRACES.format(rank=rank))
    traced = readings.traces(tmp_path)
    always, once = readings.missing(traced)
    assert always == Missing("blocks.4.attn.gate_mlp.weight", (0, 1), (1, 2), True)
    assert once == Missing("head", (0, 1), (1,), False)
    assert readings.missing(traced, {0: 1, 1: 0}) == (
        Missing("blocks.4.attn.gate_mlp.weight", (0,), (1,), True), Missing("head", (0,), (1,), True)
    )  # fmt: skip
    assert (always.owner, once.owner) == ("blocks.4.attn.gate_mlp", "the model itself")
    assert readings.buckets(traced) == [
        f"[DDP] rank={r} bucket_elems=1024 dtype=torch.float32" for r in (0, 1)
    ]


def test_files_that_are_torn_or_not_there_are_nothing(tmp_path: Path) -> None:
    (tmp_path / "rank0").mkdir()
    (tmp_path / "rank0" / "collectives.json").write_text('[{"seq": 1')
    (tmp_path / "facts_rank0.json").write_text("{")
    assert readings.collectives(tmp_path) == {} and readings.facts(tmp_path) == {}
    assert readings.traces(tmp_path) == {} and readings.gradients(tmp_path) == []


def test_a_program_that_took_no_step_or_fewer_proves_no_more_than_that() -> None:
    nothing = phase_result(STEPS, Verdict.PASSED, None, {})
    assert nothing.outcome is Outcome.SKIPPED
    assert (
        nothing.cause == "the program ended before it trained or made a process group, so nothing was tried"
    )
    by_hand = phase_result(STEPS, Verdict.PASSED, None, {0: {"began": 0.0, "steps": []}})
    assert (by_hand.outcome, by_hand.notes) == (Outcome.PASS, ("no step of a torch optimizer was seen",))
    one = phase_result(STEPS, Verdict.PASSED, None, {0: {"began": 0.0, "steps": [1.0]}})
    assert one.outcome is Outcome.PASS
    assert one.notes == ("the program ended by itself after 1 of 3 steps",)


def test_how_far_each_rank_was_when_one_left() -> None:
    phase = plan(Given("script"))[2]
    facts = {0: {"steps": [1.0] * 10}, 1: {"steps": [1.0] * 10}}
    left = Cause(1, "left", "rank 1 never reached all_reduce #16", "t.py:17 in main")
    result = phase_result(phase, Verdict.FAILED, left, facts, likely="uneven")
    assert result.likely == "uneven (rank 1 finished after 10 steps, rank 0 was in step 11)"
    assert phase_result(phase, Verdict.FAILED, Cause(1, "exception", "boom"), facts).likely == ""
