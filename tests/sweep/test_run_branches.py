"""Sweeps of real runs of a tiny script: verdicts, logs, results, resuming, and what was not planned."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pytest_gputrain.sweep.runner import SweepResult, run_sweep
from tests.sweep.conftest import SCRIPT

pytestmark = pytest.mark.skipif("sys.platform != 'linux'", reason="launching ranks needs Linux")
Plan = Callable[..., Path]


@pytest.fixture(autouse=True)
def _one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same start-up environment for all, so that they share the process that forks ranks."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


def run(folder: Path, checkpoint: Path, *args: object, **asked: Any) -> SweepResult:
    return run_sweep(folder, checkpoint=checkpoint, script=str(SCRIPT), args=args, **asked)


def document(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "results" / "sweep_results.json").read_text())
    return found


def test_branches_that_pass_and_are_not_run_twice(planned: Plan, checkpoint: Path) -> None:
    folder, said = planned(1, 4), list[str]()
    first = run(folder, checkpoint, tell=said.append)
    assert first.passed
    assert [(r.k, r.verdict, r.exit_code, r.tokens) for r in first.results] == [
        (1, "PASSED", 0, 248), (4, "PASSED", 0, 248)
    ]  # fmt: skip
    assert [r.learning_rate for r in first.results] == [3e-3, 6e-3]
    assert not any(r.notes or r.message for r in first.results)
    found = document(folder)
    assert (found["successful_runs"], found["total_runs"]) == (2, 2)
    assert found["total_duration"] > 0 and found["timestamp"].startswith("20")
    assert found["results"][1]["curve"][-1][0] == 248
    assert found["results"][1]["final_loss"] == found["results"][1]["curve"][-1][1]

    log = (folder / "results" / "branch_k4.log").read_text()
    assert "learning_rate = 0.006" in log.split("=" * 80)[1]
    assert re.search(r"verdict:  PASSED\nexit code: 0\nduration: \d+\.\d s\n=+\n$", log)
    assert not [path for path in (folder / "results").iterdir() if path.is_dir()]

    again = run(folder, checkpoint, tell=said.append)
    assert again.passed and all(r.resumed for r in again.results)
    assert sum("started" in line for line in said) == 2

    config = folder / "branch_k4.py"
    config.write_text(config.read_text() + "\n# edited\n")
    third = run(folder, checkpoint, tell=said.append)
    assert [r.resumed for r in third.results] == [True, False]
    assert len(document(folder)["results"]) == 2


def test_every_fate_is_told_apart_and_stops_no_other(planned: Plan, checkpoint: Path) -> None:
    folder = planned(1, 2, 4, 8)
    code = (
        "import os, signal, sys, time\n"
        "k = int(sys.argv[sys.argv.index('--config') + 1].rsplit('_k', 1)[1].removesuffix('.py'))\n"
        "if k == 1: raise RuntimeError('planted')\n"
        "if k == 2: print('last words', flush=True); os.kill(os.getpid(), signal.SIGKILL)\n"
        "if k == 4: time.sleep(3600)\n"
    )
    script = folder.parent / "fates.py"
    script.write_text(code)
    result = run_sweep(folder, checkpoint=checkpoint, script=str(script), stall=6.0, jobs=2)
    assert not result.passed
    fates = {r.k: (r.verdict, r.exit_code) for r in result.results}
    assert fates == {1: ("FAILED", 1), 2: ("CRASHED", -9), 4: ("HUNG", None), 8: ("PASSED", 0)}
    assert "RuntimeError: planted" in result.results[0].message
    assert document(folder)["successful_runs"] == 1
    last = result.results[3]
    assert last.final_loss is None
    assert last.notes == (
        "the script reports no loss",
        "the script reports no tokens, so its budget is not checked",
        "no optimizer of torch's was seen and no rate reported, so the rate is not checked",
        "ckpt.pt was not opened by the script, as far as Python tells: does it start from there?",
    )
    log = (folder / "results" / "branch_k2.log").read_text()
    assert "last words" in log and "CRASHED after" in log and "exit code: -9" in log

    script.write_text("print('step 1 loss 2.5')\n")  # mended: only what had not passed runs again
    mended = run_sweep(folder, checkpoint=checkpoint, script=str(script), stall=6.0, jobs=2)
    assert mended.passed
    assert [r.resumed for r in mended.results] == [False, False, False, True]
    assert mended.results[0].final_loss == 2.5
    assert "the script has changed since it ran; --rerun runs it again" in mended.results[3].notes


def test_a_branch_alone_keeps_the_others_results(planned: Plan, checkpoint: Path) -> None:
    """As tasks of an array do, one after the other."""
    folder = planned(1, 2)
    assert run(folder, checkpoint, k_values=[2]).passed
    assert document(folder)["planned_runs"] == 2
    run(folder, checkpoint, k_values=[1])
    assert [entry["k"] for entry in document(folder)["results"]] == [1, 2]
    other = run(folder, checkpoint, "--manner=prints_only", k_values=[1])
    assert [r.k for r in other.all_results] == [1]  # the other's are another command's


MESSAGES = {
    "rate_of_checkpoint": "rate overwritten by the checkpoint: it trained at 0.001, which is the "
    "checkpoint's, and not at the planned 0.006; set group['lr'] after optimizer.load_state_dict",
    "rate_of_checkpoint_by_scheduler": "rate overwritten by the checkpoint: it trained at 0.001",
    "rate_ignored": "rate does not follow the plan: it trained at 0.123 as k=1 did, planned are 0.006 and "
    "0.003",
    "token_overshoot": "token overshoot: it saw 256, every branch has to see 248 (4 steps, the last of 7",
    "too_few_tokens": "too few tokens: it saw 240, every branch has to see 248",
    "batch_not_target": "effective batch is 4 sequences a step, planned are 8",
    "batch_twice_the_target": "2 optimizer steps for all 248 tokens, planned are 4: too few, so the batch "
    "was larger than the target, or steps were skipped",
    "step_per_micro_step": "8 optimizer steps, planned are 4: one per micro-batch",
}


@pytest.mark.parametrize("defect", MESSAGES)
def test_a_branch_that_is_not_what_was_planned(planned: Plan, checkpoint: Path, defect: str) -> None:
    """Each script says that it did what it was asked for, and ends with 0."""
    folder = planned(*([1, 4] if defect == "rate_ignored" else [4]))
    result = run(folder, checkpoint, f"--defect={defect}")
    bad = result.results[-1]
    assert (bad.verdict, bad.success, bad.exit_code) == ("FAILED", False, 0)
    assert bad.message.startswith(MESSAGES[defect])


def test_a_rate_that_another_runner_of_the_sweep_trained_at_too(planned: Plan, checkpoint: Path) -> None:
    """As in an array: one process a branch, one results folder."""
    folder = planned(1, 4)
    assert run(folder, checkpoint, "--defect=rate_ignored", k_values=[1]).passed  # nothing to compare with
    bad = run(folder, checkpoint, "--defect=rate_ignored", k_values=[4]).results[0]
    assert bad.verdict == "FAILED"
    assert bad.message.startswith(MESSAGES["rate_ignored"])
    alone = run(folder, checkpoint, "--defect=rate_ignored", k_values=[1], rerun=True)
    assert alone.passed and not alone.results[0].resumed  # it is not compared with itself


@pytest.mark.parametrize(
    ("manner", "note"),
    [
        (
            "from_nothing",
            "ckpt.pt was not opened by the script, as far as Python tells: does it start from there?",
        ),
        ("warm_up", None),
        ("two_groups", None),
        ("says_nothing", "the script reports no loss"),
        ("prints_only", "the script reports no tokens, so its budget is not checked"),
        ("diverges", "the final loss is nan"),
    ],
)
def test_healthy_manners_of_training(planned: Plan, checkpoint: Path, manner: str, note: str | None) -> None:
    result = run(planned(4), checkpoint, f"--manner={manner}")
    found = result.results[0]
    assert found.verdict == "PASSED", found.message
    assert found.notes[:1] == ((note,) if note else ())
    assert (found.final_loss is None) == (manner == "says_nothing")
    written = document(result.path.parents[1])["results"][0]
    assert written["success"]
    assert (written["final_loss"] is None) == (manner in ("says_nothing", "diverges"))


def test_a_branch_that_changes_the_checkpoint_ends_the_sweep(planned: Plan, checkpoint: Path) -> None:
    result = run(planned(1, 2), checkpoint, "--defect=changes_checkpoint")
    assert [r.verdict for r in result.results] == ["FAILED", "SKIPPED"]
    assert "has changed while branch_k1 ran" in result.results[0].message


def test_a_configuration_that_changes_meanwhile_is_not_run(planned: Plan, checkpoint: Path) -> None:
    folder = planned(1, 2)
    script = folder.parent / "edits.py"
    script.write_text(f"open({str(folder / 'branch_k2.py')!r}, 'a').write('# more')\n")
    result = run_sweep(folder, checkpoint=checkpoint, script=str(script))
    assert [r.verdict for r in result.results] == ["PASSED", "FAILED"]
    assert "branch_k2.py has changed since the sweep was started" in result.results[1].message


def test_two_ranks_share_a_branch(planned: Plan, checkpoint: Path) -> None:
    folder = planned(1, world_size=2, base_batch=4)
    script = folder.parent / "ranks.py"
    script.write_text("import os\nprint('rank', os.environ['RANK'], 'of', os.environ['WORLD_SIZE'])\n")
    result = run_sweep(folder, checkpoint=checkpoint, script=str(script))
    assert result.passed
    log = (folder / "results" / "branch_k1.log").read_text()
    assert "rank 0 of 2" in log and "rank 1 of 2" in log and "--nproc-per-node=2" in log


def test_placeholders_take_the_place_of_options(planned: Plan, checkpoint: Path) -> None:
    folder = planned(4)
    script = folder.parent / "own_names.py"
    script.write_text("import sys\nprint(sys.argv[1:])\n")
    args = ["lr={learning_rate}", "init={checkpoint}", "{{braces}}", "tags={wandb_tags}"]
    run_sweep(folder, checkpoint=checkpoint, script=str(script), args=args)
    log = (folder / "results" / "branch_k4.log").read_text()
    assert f"['lr=0.006', 'init={checkpoint}', '{{braces}}', 'tags=k=4,batch=8,lr-sqrt']" in log
