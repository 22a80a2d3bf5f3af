"""Every path of the decision tree ends in the sentence that says what to change."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pytest_gputrain.diagnose.phases import Given, plan
from pytest_gputrain.diagnose.records import Missing, Outcome, Phase, PhaseResult
from pytest_gputrain.diagnose.report import Report
from pytest_gputrain.diagnose.tree import decide

GIVEN = Given("case", backend="nccl", branches=("a", "b"), checkpointing=True)
PHASES = {phase.name: phase for phase in plan(GIVEN)}
PASS, FAIL, HANG, SLOW, CRASH, SKIPPED = Outcome
EXTRA = Missing("extra.weight", (0, 1), (1, 2, 3), True)
SOMETIMES = Missing("extra.weight", (1,), (2,), False)


def results(**outcomes: Any) -> list[PhaseResult]:
    """All phases pass but those named; a value is an outcome, or (outcome, fields of the result)."""
    found = []
    for name, phase in PHASES.items():
        given_as = outcomes.get(name.replace(":", "_"), PASS)
        outcome, fields = given_as if isinstance(given_as, tuple) else (given_as, {})
        cause = "" if outcome is PASS else f"cause of {name}"
        found.append(PhaseResult(phase, outcome, **{"cause": cause, "backend": "nccl", **fields}))
    return found


HUNG = (HANG, {"location": "train.py:7 in step", "kind": "deadlock", "likely": "a barrier under if"})
TREE: list[tuple[str, dict[str, Any], list[str], str]] = [
    ("all pass", {}, ["healthy"], "nothing to change"),
    (
        "static graph passes",
        {"ddp_steps": FAIL, "find_unused": FAIL},
        ["static_graph", "own_error"],
        "DistributedDataParallel(model, static_graph=True). It demands that the same parameters are used",
    ),
    (
        "find_unused passes",
        {"ddp_steps": FAIL, "static_graph": FAIL},
        ["find_unused", "own_error"],
        "wrap with find_unused_parameters=True",
    ),
    (
        "FSDP2 passes",
        {"ddp_steps": FAIL, "static_graph": FAIL, "find_unused": FAIL},
        ["fsdp2", "own_error"],
        "the fault is in how DDP buckets",
    ),
    (
        "one branch fails",
        {"branch_b": HANG, "ddp_steps": HANG},
        ["branch", "static_graph"],
        "of the branches run alone only branch b failed (cause of branch:b): mend its backward",
    ),
    (
        "all branches fail",
        {"branch_a": FAIL, "branch_b": FAIL},
        ["all_branches"],
        "the fault is in what they share",
    ),
    (
        "missing parameters",
        {"ddp_steps": (FAIL, {"missing": (EXTRA,)})},
        ["missing", "static_graph"],
        "extra.weight. Look at extra: an in-place operation or detach() cuts them off, or forward never uses",
    ),
    (
        "missing on one rank",
        {"ddp_steps": (FAIL, {"missing": (SOMETIMES,)}), "static_graph": FAIL},
        ["missing_differs", "find_unused"],
        "first extra.weight (ranks 1, steps 2): forward branches on rank or data in extra",
    ),
    (
        "gloo hangs too",
        {"ddp_steps": HUNG, "gloo": HUNG, "static_graph": HANG, "find_unused": HANG, "fsdp2": HANG},
        ["own_error", "control_flow"],
        "it hangs on gloo and on NCCL, so the transport is not to blame but autograd or control flow",
    ),
    (
        "hangs on gloo",
        {"ddp_steps": (HANG, {"backend": "gloo", "kind": "deadlock"}), "gloo": SKIPPED, "static_graph": HANG},
        ["own_error", "find_unused", "control_flow"],
        "it hangs on gloo, so the transport",
    ),
    (
        "only NCCL hangs",
        {"ddp_one_step": HUNG, "static_graph": HANG, "find_unused": HANG, "fsdp2": HANG},
        ["own_error", "transport"],
        "Likely: a barrier under if it hangs on NCCL and passes on gloo: the transport is to blame",
    ),
    (
        "one layer",
        {"checkpointing": (FAIL, {"range": (3, 4)})},
        ["layer"],
        "with activation checkpointing layer 3 fails and the others do not",
    ),
    (
        "layers together",
        {"gradient_parity": (FAIL, {"range": (1, 3)})},
        ["layer"],
        "layers 1 to 2 (only together)",
    ),
    ("checkpointing, no range", {"checkpointing": FAIL}, ["checkpointing"], "no smaller range of layers"),
    ("parity, no range", {"gradient_parity": FAIL}, ["parity"], "recomputation does not repeat forward"),
    (
        "slow",
        {"ddp_steps": (SLOW, {"profile": "steps took 20 s", "finished": False})},
        ["slow"],
        "no hang: ranks made progress in ddp_steps, only slowly. steps took 20 s. Make that faster",
    ),
    ("slow, but done", {"ddp_steps": (SLOW, {"profile": "one step"})}, ["healthy", "slow"], "one step"),
    (
        "only in a later step",
        {"ddp_whole": (HANG, {"kind": "left"})},
        ["own_error"],
        "mend what the cause names: cause of ddp_whole",
    ),
    ("also seen", {"static_graph": FAIL}, ["healthy"], "nothing to change in the program as it is"),
    (
        "alone",
        {"ddp_steps": CRASH, "single": (CRASH, {"location": "train.py:3 in f"})},
        ["alone", "own_error"],
        "it fails in a single process too (cause of single), so data parallelism is not to blame: mend it at "
        "train.py:3 in f first",
    ),
    ("nothing ran", {name.replace(":", "_"): SKIPPED for name in PHASES}, ["nothing_ran"], "proves nothing"),
]  # fmt: skip


@pytest.mark.parametrize(("outcomes", "kinds", "sentence"), [t[1:] for t in TREE], ids=[t[0] for t in TREE])
def test_a_path_and_its_advice(outcomes: dict[str, Any], kinds: list[str], sentence: str) -> None:
    decision = decide(results(**outcomes))
    assert [advice.kind for advice in decision.advice][: len(kinds)] == kinds
    assert sentence in " ".join(advice.text for advice in decision.advice)


def test_every_leaf_has_a_test() -> None:
    from pytest_gputrain.diagnose import advice, tree

    source = Path(tree.__file__).read_text()
    leaves = {name for name in vars(advice) if f"advice.{name}(" in source}
    tested = {kind for _, _, kinds, _ in TREE for kind in kinds}
    names = {"on_gloo": "control_flow", "raised": "own_error"}
    assert {names.get(leaf, leaf) for leaf in leaves} - tested == {"interrupted"}


def test_the_path_is_shown_with_its_answers() -> None:
    path = decide(results(ddp_steps=FAIL, find_unused=FAIL)).path
    assert path[:4] == (
        "Did the program itself fail? ddp_steps FAIL",
        "Does it fail in a single process too? no",
        "Does it fail within the first steps? yes",
        "Does it pass with a static graph? yes -> static_graph",
    )


def any_result(phase: Phase) -> st.SearchStrategy[PhaseResult]:
    return st.builds(
        PhaseResult,
        st.just(phase),
        st.sampled_from(Outcome),
        cause=st.sampled_from(["", "boom"]),
        kind=st.sampled_from(["", "exception", "deadlock"]),
        missing=st.sampled_from([(), (EXTRA,), (SOMETIMES,)]),
        range=st.sampled_from([None, (0, 1), (1, 3)]),
        backend=st.sampled_from(["gloo", "nccl", ""]),
        finished=st.booleans(),
    )


@given(st.tuples(*map(any_result, PHASES.values())), st.integers(0, len(PHASES)))
def test_never_without_advice_and_never_green_by_mistake(all_of: Any, ran: int) -> None:
    report = Report("train.py", "script", all_of[:ran], len(PHASES), "cpu")
    decision = report.decision
    assert decision.advice and decision.path and all(one.text for one in decision.advice)
    kinds = {one.kind for one in decision.advice}
    green = report.verdict == "PASS"
    assert green == (
        ran == len(PHASES)
        and not any(result.red and result.phase.accuses for result in all_of)
        and any(result.outcome is not SKIPPED for result in all_of)
    )
    assert ("healthy" in kinds) == green
    assert report.headline.startswith((report.verdict, "NOTHING RAN"))
