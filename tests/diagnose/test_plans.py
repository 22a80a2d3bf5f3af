"""Whole plans on planted programs: the right outcome in each phase, the right advice first, nothing left."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.diagnose.conftest import Diagnose

pytestmark = pytest.mark.skipif("sys.platform != 'linux'", reason="launching ranks needs Linux")
ROOT = Path(__file__).parents[2]
SCRIPTS = Path("tests/planted/scripts")
WITH_ARGUMENTS = str(SCRIPTS / "with_arguments.py")
MODULE = "tests.planted.scripts.package.train"
PLANTED = "tests.planted.diagnosed"
SOME = "--phases=ddp_steps,ddp_whole,static_graph,single"


def slow(*values: object) -> object:
    return pytest.param(*values, marks=pytest.mark.slow)


@pytest.fixture(autouse=True)
def _in_the_checkout(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


@pytest.mark.parametrize(
    "program",
    [[str(SCRIPTS / "plain_loop.py")], ["-m", MODULE], [WITH_ARGUMENTS, "--steps", "4"]],
    ids=["plain loop", "module", "arguments"],
)
def test_a_healthy_script_of_any_shape_passes(diagnose: Diagnose, program: list[str]) -> None:
    done = diagnose(SOME, *program)
    assert done.code == 0, done.stdout
    assert set(done.outcomes.values()) == {"PASS"}
    assert done.advice == ["healthy"]
    assert (done.out / "04-single" / "gradients_rank0.jsonl").read_text().count("\n") == 3
    asks_for_nccl = "with_arguments" in program[-3:][0]
    assert done.report["notes"] == ["the program asks for nccl and ran on gloo"] * asks_for_nccl


@pytest.mark.slow
@pytest.mark.parametrize(
    "program",
    [[str(SCRIPTS / "plain_loop.py")], ["-m", MODULE], [WITH_ARGUMENTS]],
    ids=["plain", "m", "args"],
)
def test_the_whole_plan_of_a_healthy_script(diagnose: Diagnose, program: list[str]) -> None:
    done = diagnose(*program)
    assert done.code == 0, done.stdout
    assert set(done.outcomes.values()) == {"PASS", "SKIPPED"}


def test_an_unused_parameter_is_named_by_the_phase_of_several_steps(diagnose: Diagnose) -> None:
    phases = "--phases=ddp_one_step,ddp_steps,static_graph,find_unused,single"
    done = diagnose(phases, WITH_ARGUMENTS, "--defect", "unused")
    assert done.code == 1
    assert done.outcomes == {
        "ddp_one_step": "PASS", "ddp_steps": "FAIL", "static_graph": "PASS", "find_unused": "PASS",
        "single": "PASS",
    }  # fmt: skip
    assert done.advice == ["missing", "static_graph", "own_error"]
    failed = done.phase("ddp_steps")
    assert failed["cause"].endswith(
        "no gradient in the last step for extra.weight, extra.bias (DDP waited for them)"
    )
    assert "with_arguments.py:" in failed["location"]
    assert "ddp_steps extra.weight ranks=0,1 steps=1\n" in (done.out / "all_missing_params.txt").read_text()
    assert "ddp_steps [DDP] rank=0 bucket_elems=" in (done.out / "ddp_buckets.txt").read_text()
    assert (
        "- Does it pass with a static graph? yes -> static_graph\n" in (done.out / "SUMMARY.md").read_text()
    )
    assert "  Does it pass with a static graph? yes -> static_graph\n" in done.stdout


def test_the_folder_of_a_phase(diagnose: Diagnose) -> None:
    done = diagnose("--phases=ddp_steps", WITH_ARGUMENTS, "--defect", "conditional")
    assert done.code == 1 and done.outcomes == {"ddp_steps": "HANG"}
    folder = done.out / "01-ddp_steps"
    assert {"output.log", "traces.log", "result.txt", "environment.json", "timeline.json", "rank0"} <= {
        path.name for path in folder.iterdir()
    }
    assert (folder / "result.txt").read_text().startswith("HANG ddp_steps: 3 steps")
    assert "File " in (folder / "rank0" / "stacks.txt").read_text()
    assert '"step"' in (folder / "rank1" / "heartbeat_rank1.jsonl").read_text()
    assert json.loads((folder / "environment.json").read_text())["TORCH_DISTRIBUTED_DEBUG"] == "INFO"
    events = json.loads((folder / "timeline.json").read_text())["traceEvents"]
    assert [event["tid"] for event in events if event.get("cname") == "terrible"]
    summary = (done.out / "SUMMARY.md").read_text()
    assert "![ranks as lanes, collectives as bars](01-ddp_steps/timeline.svg)" in summary
    assert "#d62728" in (folder / "timeline.svg").read_text()
    assert "ddp_steps: HANG in" in (done.out / "test_execution.log").read_text()
    assert not list(done.out.rglob("launch"))


@pytest.mark.parametrize(
    ("name", "code", "outcomes", "advice"),
    [
        ("healthy", 0, {"ddp_steps": "PASS", "fsdp2": "PASS", "gradient_parity": "PASS"}, "healthy"),
        slow("one_branch_fails", 1, {"branch:narrow": "FAIL", "branch:wide": "PASS"}, "branch"),
        ("one_branch_hangs", 1, {"branch:narrow": "HANG", "branch:wide": "PASS", "single": "PASS"}, "branch"),
        ("one_layer_recomputes_differently", 1, {"ddp_steps": "PASS", "gradient_parity": "FAIL"}, "layer"),
        pytest.param(
            "one_layer_cannot_be_recomputed",
            1,
            {"ddp_steps": "PASS", "checkpointing": "FAIL"},
            "layer",
            marks=pytest.mark.nightly,
        ),
        slow("fails_alone", 1, {"ddp_one_step": "PASS", "ddp_steps": "FAIL", "single": "FAIL"}, "alone"),
    ],
)
def test_the_whole_plan_of_a_case(
    diagnose: Diagnose, name: str, code: int, outcomes: dict[str, str], advice: str
) -> None:
    done = diagnose("--case", f"{PLANTED}:{name}")
    assert done.code == code, done.stdout
    assert {phase: done.outcomes[phase] for phase in outcomes} == outcomes, done.stdout
    assert done.advice[0] == advice, done.stdout
    if advice == "layer":
        failed = next(phase for phase in done.report["phases"] if phase["outcome"] == "FAIL")
        assert failed["range"] == [2, 3]
        assert "with activation checkpointing layer 2 fails" in done.stdout


def test_uneven_steps_show_only_in_the_whole_run(diagnose: Diagnose) -> None:
    done = diagnose(SOME, WITH_ARGUMENTS, "--defect", "uneven")
    assert (done.code, done.outcomes["ddp_steps"], done.outcomes["ddp_whole"]) == (1, "PASS", "HANG")
    assert "rank 1" in done.phase("ddp_whole")["cause"]
    assert "static_graph" not in done.advice  # three steps of it say nothing of the fifth
    assert "control_flow" in done.advice


UNEVEN = """
import torch
import torch.distributed as dist
dist.init_process_group("gloo")
model = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(2, 2))
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
for _ in range(6 - 2 * dist.get_rank()):
    model(torch.ones(2, 2)).sum().backward()
    optimizer.step()
dist.destroy_process_group()
"""


def test_a_rank_that_destroyed_its_group_is_told_with_its_steps(diagnose: Diagnose, tmp_path: Path) -> None:
    (tmp_path / "uneven.py").write_text(UNEVEN)
    done = diagnose("--phases=ddp_whole", str(tmp_path / "uneven.py"))
    assert (done.code, done.advice[0]) == (1, "own_error"), done.stdout
    failed = done.phase("ddp_whole")
    assert failed["kind"] == "left" and failed["cause"].startswith("rank 1 ")
    for text in (done.stdout, (done.out / "SUMMARY.md").read_text()):
        assert "Likely: ranks ran a different number of steps" in text
        assert "(rank 1 finished after 4 steps, rank 0 was in step 5)" in text
    assert (done.out / "01-ddp_whole" / "rank0" / "collectives.json").is_file()
    assert not list(done.out.rglob("calls.last"))


@pytest.mark.slow
def test_a_slow_program_is_no_hang(diagnose: Diagnose) -> None:
    arguments = [WITH_ARGUMENTS, "--defect", "busy", "--seconds", "4", "--steps", "50"]
    done = diagnose("--phases=ddp_steps,ddp_whole", *arguments, timeout=10, stall=8)
    assert done.code == 1
    assert done.outcomes["ddp_steps"] == "SLOW"
    assert done.outcomes["ddp_whole"] in ("PASS", "SLOW")
    assert done.advice[0] == "slow"
    assert "steps of rank 0 took" in done.phase("ddp_steps")["profile"]
    assert "with_arguments.py" in done.phase("ddp_steps")["profile"]


def test_an_interrupted_plan_writes_what_there_is_and_never_says_pass(tmp_path: Path) -> None:
    out = tmp_path / "out"
    command = [sys.executable, "-m", "pytest_gputrain", "diagnose", f"--out={out}", WITH_ARGUMENTS]
    child = subprocess.Popen(
        [*command, "--seconds", "0.5", "--steps", "1000"],
        cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    until = time.monotonic() + 100
    while not (out / "03-ddp_whole" / "facts_rank0.json").exists() and time.monotonic() < until:
        time.sleep(0.1)
    child.send_signal(signal.SIGINT)
    _, err = child.communicate(timeout=60)
    assert (child.returncode, err) == (130, "gputrain diagnose: interrupted\n")
    report = json.loads((out / "report.json").read_text())
    assert (report["verdict"], report["interrupted"]) == ("INTERRUPTED", True)
    assert [phase["name"] for phase in report["phases"]] == ["ddp_one_step", "ddp_steps"]
    summary = (out / "SUMMARY.md").read_text()
    assert summary.startswith("# INTERRUPTED")
    assert "proves nothing" in summary and "# PASS" not in summary
