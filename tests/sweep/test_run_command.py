"""``gputrain branches run``: bad input before anything starts, dry runs, questions, and being interrupted."""

from __future__ import annotations

import json
import os
import pickle
import pty
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from pytest_gputrain.cli import main
from tests.sweep.conftest import SCRIPT

pytestmark = pytest.mark.skipif("sys.platform != 'linux'", reason="launching ranks needs Linux")
Plan = Callable[..., Path]
ROOT = Path(__file__).parents[2]


def code_of(*arguments: object) -> int:
    """What the process would exit with: argparse leaves by SystemExit."""
    try:
        return main(["branches", "run", *map(str, arguments)])
    except SystemExit as left:
        return int(left.code or 0)


def refusal(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """The one line of a refused command, without what is in front of it."""
    assert code_of(*arguments) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1, (out, err)
    return err.removeprefix("gputrain branches run: ").rstrip("\n")


def foreign(path: Path) -> str:
    path.write_bytes(b"not a checkpoint")
    return (
        "torch.save did not write it, or it is cut short; save state dicts and plain values with torch.save"
    )


def code(path: Path) -> str:
    """Would run something when it is loaded as a pickle."""
    path.write_bytes(pickle.dumps(os.system, protocol=2))
    return "it holds posix.system, which torch does not load with weights_only=True; save state dicts and "


def empty(path: Path) -> str:
    import torch

    torch.save({"step": 7}, path)
    return "it holds no tensor, so no weights; give a checkpoint of the base run"


def folder(path: Path) -> str:
    path.mkdir()
    return "is a folder, give one file; give a file that torch.save wrote"


def missing(path: Path) -> str:
    return "there is no such file; give a file that torch.save wrote"


@pytest.mark.parametrize("make", [foreign, code, empty, folder, missing])
def test_checkpoints_that_are_none(
    planned: Plan, tmp_path: Path, capsys: pytest.CaptureFixture[str], make: Callable[[Path], str]
) -> None:
    plan, path = planned(1), tmp_path / "other.pt"
    why = make(path)
    said = refusal(capsys, plan, "--checkpoint", path, "--", SCRIPT)
    assert said.startswith(f"--checkpoint {path}: {why}")
    assert not (plan / "results").exists()


def edit(text: str) -> Callable[[Path], None]:
    def apply(plan: Path) -> None:
        (plan / "branch_k2.py").write_text(text)

    return apply


def file_for_folder(plan: Path) -> None:
    (plan / "results").write_text("a file")


def nothing(plan: Path) -> None:
    return None


@pytest.mark.parametrize(
    ("spoil", "arguments", "message"),
    [
        (edit("k = = 2\n"), [], "branch_k2.py:1: invalid syntax"),
        (file_for_folder, [], "results cannot be written (File exists); give a folder that can be, by --out"),
        (nothing, ["--out", "/proc/nowhere"], "/proc/nowhere cannot be written ("),
        (nothing, ["--k", "3"], "it has 1, 2"),
        (nothing, ["--k", "2", "2"], "k 2 is given twice; give each k once"),
        (nothing, ["--index", "2"], "give 0 to 1"),
        (nothing, ["--index", "0", "--k", "1"], "--index and --k both choose branches; give one of them"),
        (nothing, ["--nproc", "2"], "--nproc 2, but "),
        (nothing, ["--jobs", "0"], "argument --jobs: '0' is not legal"),
    ],
)
def test_bad_input_starts_nothing(
    planned: Plan,
    checkpoint: Path,
    capsys: pytest.CaptureFixture[str],
    spoil: Callable[[Path], None],
    arguments: list[str],
    message: str,
) -> None:
    plan = planned(1, 2)
    spoil(plan)
    assert message in refusal(capsys, plan, "--checkpoint", checkpoint, *arguments, "--", SCRIPT)
    assert not list(plan.glob("results/*"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{chekpoint}"], "{chekpoint} is no placeholder; legal are {config}, {checkpoint}, {metrics} and "),
        (
            ["--lr={learning_rate}"],
            "the arguments have {learning_rate} but no {checkpoint}, so no branch would",
        ),
        (["{checkpoint}"], "the arguments have neither {config} nor {learning_rate}, so all branches would"),
    ],
)
def test_placeholders_that_cannot_be_meant(
    planned: Plan,
    checkpoint: Path,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    said = refusal(capsys, planned(1), "--checkpoint", checkpoint, "--", SCRIPT, *arguments)
    assert said.startswith(message)


def test_a_folder_without_a_plan_and_a_script_that_is_not_there(
    planned: Plan, checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    said = refusal(capsys, tmp_path, "--checkpoint", checkpoint, "--", SCRIPT)
    assert said == (
        f"{tmp_path}: it holds no manifest.json; gputrain branches plan --out {tmp_path} writes one"
    )
    said = refusal(capsys, planned(1), "--checkpoint", checkpoint, "--", tmp_path / "none.py")
    assert said.startswith(f"script '{tmp_path}/none.py' does not exist")
    assert "the following arguments are required: SCRIPT" in refusal(
        capsys, tmp_path, "--checkpoint", checkpoint
    )


def test_a_branch_that_another_process_runs(
    planned: Plan, checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plan = planned(1, 2)
    results = plan / "results"
    results.mkdir()
    program = (
        "import sys; from pathlib import Path; from pytest_gputrain.sweep.results import hold; "
        "lock = hold(Path(sys.argv[1]), 'branch_k2'); print('held', flush=True); sys.stdin.read()"
    )
    given = [sys.executable, "-c", program, str(results)]
    with subprocess.Popen(given, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=ROOT) as other:
        assert other.stdout is not None and other.stdout.readline() == b"held\n"
        assert code_of(plan, "--checkpoint", checkpoint, "--", SCRIPT) == 2
        other.communicate()  # closes its input, which ends it
    assert capsys.readouterr().err == (
        f"gputrain branches run: branch_k2 is being run by another process, with results in {results}; "
        "wait for it, or give another --out\n"
    )
    assert not list(results.glob("branch_*"))


def test_results_that_cannot_be_written_any_more(
    planned: Plan, checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The branch passes, the sweep does not. Who starts it again is told before anything runs."""
    plan, script = planned(1), tmp_path / "in_the_way.py"
    script.write_text(
        "import sys\nfrom pathlib import Path\n"
        "metrics = Path(sys.argv[sys.argv.index('--metrics') + 1])\n"
        "(metrics.parent / 'sweep_results.json').mkdir()\n"
    )
    assert code_of(plan, "--checkpoint", checkpoint, "--", script) == 1
    said = capsys.readouterr().out
    path = plan / "results" / "sweep_results.json"
    assert "branch_k1: PASSED" in said and "1 of 1 passed" in said
    assert f"{path} cannot be written (Is a directory)\n" in said
    assert sorted(entry.name for entry in path.parent.glob(".sweep_results.json.*")) == []
    said = refusal(capsys, plan, "--checkpoint", checkpoint, "--", script)
    assert said.startswith(f"{path.parent} cannot be written (sweep_results.json in it is a folder)")


def test_a_dry_run_prints_commands_and_writes_nothing(
    planned: Plan, checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plan = planned(1, 2)
    before = sorted(plan.rglob("*"))
    assert code_of(plan, "--checkpoint", checkpoint, "--dry-run", "--", SCRIPT, "--a", "--", "-b") == 0
    assert capsys.readouterr().out.splitlines() == [
        f"torchrun --nproc-per-node=1 {SCRIPT} --a -- -b --config {plan}/branch_k{k}.py "
        f"--checkpoint {checkpoint} --metrics {plan}/results/branch_k{k}.metrics.jsonl"
        for k in (1, 2)
    ]
    assert sorted(plan.rglob("*")) == before


def start(*arguments: object, **options: Any) -> subprocess.Popen[bytes]:
    environ = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    # As on a terminal: what a shell has started in the background ignores SIGINT, and so do its children.
    program = (
        "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler); "
        "from pytest_gputrain.cli import main; sys.exit(main())"
    )
    command = [sys.executable, "-c", program, "branches", "run", *map(str, arguments)]
    return subprocess.Popen(command, env=environ, **options)


def test_ctrl_c_ends_what_ignores_it_and_writes_what_there_is(
    planned: Plan, checkpoint: Path, tmp_path: Path
) -> None:
    """k=1 has passed, k=2 runs and heeds no signal, k=4 has not started."""
    plan = planned(1, 2, 4)
    with (tmp_path / "out").open("wb") as out:
        given = [plan, "--checkpoint", checkpoint, "--", SCRIPT, "--defect=ignores_signals", "--of=2"]
        child = start(*given, stdin=subprocess.DEVNULL, stdout=out, stderr=out, start_new_session=True)
    try:
        ready = wait_for(
            lambda: any("ready" in p.read_text() for p in plan.glob("results/.branch_k2/*/rank0/*out.log"))
        )
        below = psutil.Process(child.pid).children(recursive=True)
        assert ready and below, (tmp_path / "out").read_text()
        os.killpg(child.pid, signal.SIGINT)
        assert child.wait(60) == 130
    finally:
        child.kill()
        child.wait()
    assert not [process for process in below if process.is_running() and process.status() != "zombie"]
    found = json.loads((plan / "results" / "sweep_results.json").read_text())
    assert [(r["k"], r["verdict"], r["message"]) for r in found["results"]] == [
        (1, "PASSED", ""),
        (2, "CANCELLED", "cancelled while it ran"),
        (4, "CANCELLED", "not started"),
    ]
    assert found["successful_runs"] == 1
    said = (tmp_path / "out").read_text()
    assert "1 of 3 passed" in said
    assert said.endswith("gputrain branches run: interrupted; the same command goes on from here\n")
    log = (plan / "results" / "branch_k2.log").read_text()
    assert "ready" in log and "verdict:  CANCELLED" in log


def wait_for(condition: Callable[[], bool], seconds: float = 120) -> bool:
    limit = time.monotonic() + seconds
    while time.monotonic() < limit:
        if condition():
            return True
        time.sleep(0.02)
    return False


def test_on_a_terminal_it_asks(planned: Plan, checkpoint: Path) -> None:
    plan = planned(1)
    ours, theirs = pty.openpty()
    child = start(plan, "--checkpoint", checkpoint, "--", SCRIPT, stdin=theirs, stdout=theirs, stderr=theirs)
    os.close(theirs)
    os.write(ours, b"n\n")
    assert child.wait(120) == 0
    said = os.read(ours, 1 << 16).decode()
    os.close(ours)
    assert "start? [y/N]" in said and "nothing was started" in said
    assert not list(plan.glob("results/branch*"))


def test_rerun_runs_what_has_passed(
    planned: Plan, checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plan, script = planned(1), tmp_path / "short.py"
    script.write_text("print('step 1 loss 2.5')\n")
    given = ["--checkpoint", checkpoint, "--", script]
    said = []
    for options in ([], [], ["--rerun"]):
        assert code_of(plan, *options, *given) == 0
        said.append(capsys.readouterr().out)
    assert ["branch_k1: started" in text for text in said] == [True, False, True]
    assert "branch_k1: done before" in said[1] and "(before)" not in said[2]


def test_all_of_it_on_the_command_line(
    planned: Plan, checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One branch fails: exit code 1, and the table says which and why."""
    plan = planned(1, 2)
    given = ["--checkpoint", checkpoint, "--timeout", 100, "--", SCRIPT, "--defect=raises", "--of=2"]
    assert code_of(plan, *given) == 1
    said = capsys.readouterr().out
    assert (
        f"gputrain branches run: 2 branches of {plan} from {checkpoint}, 1 rank each on cpu, 1 at once"
        in said
    )
    assert "branch_k1: PASSED loss 0." in said
    assert "branch_k2: FAILED after " in said and "raised RuntimeError: planted" in said
    assert said.splitlines()[-2:] == ["1 of 2 passed", f"results in {plan}/results/sweep_results.json"]
    pytest.importorskip("matplotlib")
    assert (plan / "results" / "sweep.png").read_bytes().startswith(b"\x89PNG")
