"""Scripts under torch's own elastic agent: unmodified, as torchrun would run them, with a verdict."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from pytest_gputrain import launch
from pytest_gputrain.launch import LaunchCancelled, LaunchDefaults, Launcher, LaunchError, Verdict
from tests.launch.torchs_own import without_gloo

TRAIN = """
import os, sys
import torch, torch.distributed as dist

def main():
    dist.init_process_group("gloo")
    x = torch.ones(3) * (dist.get_rank() + 1)
    dist.all_reduce(x)
    print("sum", x.tolist(), "argv", sys.argv[1:])
    dist.destroy_process_group()

if __name__ == "__main__":
    main()
"""

FACTS = """
import os, sys, torch
prefixes = ("TORCH", "MASTER", "RANK", "LOCAL", "GROUP", "ROLE", "WORLD", "OMP")
names = sorted(n for n in os.environ if n.startswith(prefixes))
facts = {
    "names": names, "argv": sys.argv, "path0": sys.path[0], "name": __name__, "file": __file__,
    "spec": __spec__ is None, "threads": torch.get_num_threads(), "pytest": "pytest" in sys.modules,
    "main": sys.modules["__main__"].__file__, "stdin": sys.stdin.read(), "cwd": os.getcwd(),
    "package": __package__,
}
with open(sys.argv[1] + os.environ["RANK"], "w") as file:
    file.write(repr(facts))
"""


def write(folder: Path, name: str, text: str) -> str:
    path = folder / name
    path.write_text(textwrap.dedent(text))
    return str(path)


def torchrun(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", *arguments]
    return subprocess.run(
        command, cwd=cwd, capture_output=True, text=True, timeout=120, stdin=subprocess.DEVNULL, check=False
    )


def test_a_script_passes(tmp_path: Path) -> None:
    result = launch.torchrun(write(tmp_path, "train.py", TRAIN), "--lr", 0.1, timeout=100)
    assert result.verdict is Verdict.PASSED
    assert result.exit_code == 0
    for rank in result.ranks:
        assert without_gloo(rank.stdout) == "sum [3.0, 3.0, 3.0] argv ['--lr', '0.1']\n"


def test_everything_a_script_can_ask_about_is_as_under_torchrun(tmp_path: Path) -> None:
    script = write(tmp_path, "facts.py", FACTS)
    launch.torchrun(script, str(tmp_path / "ours"), timeout=100)
    assert torchrun(script, str(tmp_path / "ours"), cwd=tmp_path).returncode == 0
    theirs = [ast.literal_eval((tmp_path / f"ours{rank}").read_text()) for rank in range(2)]
    launch.torchrun(script, str(tmp_path / "ours"), timeout=100)
    ours = [ast.literal_eval((tmp_path / f"ours{rank}").read_text()) for rank in range(2)]
    for mine, real in zip(ours, theirs, strict=True):
        mine["cwd"] = real["cwd"]  # the subprocess ran in tmp_path
        assert mine == real


@pytest.mark.parametrize(
    ("body", "code"),
    [
        pytest.param("raise ValueError('boom')", 1, marks=pytest.mark.nightly),
        ("sys.exit(3)", 3),
        pytest.param("sys.exit('sorry')", 1, marks=pytest.mark.nightly),
    ],
)
def test_exit_code_and_error_text_are_torchruns(body: str, code: int, tmp_path: Path) -> None:
    script = write(tmp_path, "fails.py", f"import sys\ndef f():\n    {body}\nf()\n")
    result = launch.torchrun(script, nproc=1, timeout=100, check=False)
    real = torchrun("--nproc-per-node=1", script, cwd=tmp_path)
    assert result.exit_code == real.returncode == 1
    assert result.ranks[0].exit_code == code
    assert f"exitcode: {code}" in real.stderr.replace("exitcode  :", "exitcode:")
    assert f"exitcode: {code}" in result.agent_output.replace("exitcode  :", "exitcode:")
    assert bool(result.ranks[0].stderr) == (body != "sys.exit(3)")
    assert result.ranks[0].stderr in real.stderr
    assert "in f" in str(result.cause)


def test_an_exception_on_one_rank(tmp_path: Path) -> None:
    script = write(tmp_path, "train.py", TRAIN.replace("x =", "assert dist.get_rank() == 0, 'boom'; x ="))
    with pytest.raises(LaunchError) as caught:
        launch.torchrun(script, timeout=100)
    first = str(caught.value).splitlines()[0]
    assert "rank 1 raised AssertionError: boom" in first
    assert f"{script}:7 in main" in first
    assert caught.value.result.seconds < 50


@pytest.mark.parametrize(
    ("body", "verdict", "words"),
    [
        ("os._exit(0)", Verdict.CRASHED, "left with exit code 0 before it was done"),
        ("os._exit(5)", Verdict.CRASHED, "exit code 5"),
        ("os.kill(os.getpid(), 9)", Verdict.CRASHED, "was killed by SIGKILL"),
        ("os.kill(os.getpid(), 11)", Verdict.CRASHED, "was killed by SIGSEGV"),
        ("import not_there", Verdict.FAILED, "ModuleNotFoundError: No module named 'not_there'"),
        ("x = (", Verdict.FAILED, "SyntaxError: '(' was never closed"),
        ("time.sleep(1000)", Verdict.HUNG, "stopped moving"),
        ("\nwhile True: pass", Verdict.TIMED_OUT, "was still running after"),
    ],
)
def test_the_faults_of_scripts(body: str, verdict: Verdict, words: str, tmp_path: Path) -> None:
    script = write(tmp_path, "faulty.py", f"import os, sys, time; {body}\n")
    endless = verdict in (Verdict.HUNG, Verdict.TIMED_OUT)
    result = launch.torchrun(script, timeout=6 if endless else 100, check=False)
    assert result.verdict is verdict, result.summary()
    assert words in str(result.cause)
    if verdict is not Verdict.CRASHED:
        assert "faulty.py:" in str(result.cause)
    assert result.seconds < 50


def test_a_rank_that_finished_early_while_another_waits_is_hung(tmp_path: Path) -> None:
    script = write(
        tmp_path, "train.py", TRAIN.replace("dist.all_reduce(x)", "dist.get_rank() or dist.all_reduce(x)")
    )
    script = write(tmp_path, "train.py", Path(script).read_text().replace("dist.destroy_process_group()", ""))
    result = launch.torchrun(script, timeout=100, check=False)
    assert result.verdict is Verdict.HUNG
    assert "rank 1 never reached all_reduce #1 (3 x float32); it finished; rank 0 waits in it" in str(
        result.cause
    )
    assert "train.py:" in str(result.cause)
    assert result.seconds < 50


def test_a_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "package").mkdir()
    write(tmp_path / "package", "__init__.py", "")
    write(tmp_path / "package", "train.py", "print(__name__, __package__)")
    monkeypatch.chdir(tmp_path)
    result = launch.torchrun("package.train", module=True, nproc=1, timeout=100)
    assert without_gloo(result.ranks[0].stdout) == "__main__ package\n"


def test_two_nodes_played_on_this_host(tmp_path: Path) -> None:
    result = launch.torchrun(
        write(tmp_path, "train.py", TRAIN + "    print('node', os.environ['GROUP_RANK'])"),
        nproc=1, nnodes=2, timeout=100,
    )  # fmt: skip
    assert result.passed
    assert [rank.stdout.split()[-1] for rank in result.ranks] == ["0", "1"]


def test_one_of_several_nodes_waits_for_the_others_until_the_deadline(tmp_path: Path) -> None:
    script = write(tmp_path, "train.py", TRAIN)
    result = launch.torchrun(
        script, nnodes=2, node_rank=1, rdzv_endpoint="127.0.0.1:9", timeout=3, check=False
    )
    assert not result.passed
    assert result.verdict is Verdict.HUNG
    assert str(result.cause).startswith(
        "node 0 did not open 127.0.0.1:9 within 3 s (Connection refused); start "
    )


def test_restarts(tmp_path: Path) -> None:
    script = write(
        tmp_path,
        "flaky.py",
        """
        import os, sys
        if os.environ["TORCHELASTIC_RESTART_COUNT"] == "0" and os.environ["RANK"] == "1":
            raise ValueError("first try")
        print("try", os.environ["TORCHELASTIC_RESTART_COUNT"])
        """,
    )
    assert launch.torchrun(script, timeout=100, max_restarts=1).passed
    assert not launch.torchrun(script, timeout=100, check=False).passed


def test_exit_handlers_and_threads_run_to_their_end(tmp_path: Path) -> None:
    script = write(
        tmp_path,
        "late.py",
        """
        import atexit, threading, time
        atexit.register(print, "at exit")
        threading.Thread(target=lambda: (time.sleep(0.3), print("thread"))).start()
        print("main")
        """,
    )
    result = launch.torchrun(script, nproc=1, timeout=100)
    assert without_gloo(result.ranks[0].stdout) == "main\nthread\nat exit\n"


def test_a_thread_pool_that_a_script_leaves_open_ends_with_it(tmp_path: Path) -> None:
    """As torch's inductor leaves one: the interpreter tells its idle workers to end."""
    pool = """
        from concurrent.futures import ThreadPoolExecutor

        pool = ThreadPoolExecutor(2)
        pool.submit(print, "worked")
    """
    result = launch.torchrun(write(tmp_path, "pool.py", pool), nproc=1, stall=30)
    assert without_gloo(result.ranks[0].stdout) == "worked\n"


def test_files_that_a_script_leaves_open_are_written(tmp_path: Path) -> None:
    script = write(
        tmp_path,
        "train.py",
        """
        import sys
        text, binary = open(sys.argv[1], "w"), open(sys.argv[2], "wb")
        text.write("text")
        binary.write(b"binary")
        """,
    )
    launch.torchrun(script, tmp_path / "text", tmp_path / "binary", nproc=1, timeout=100)
    assert (tmp_path / "text").read_text() == "text"
    assert (tmp_path / "binary").read_bytes() == b"binary"


def test_a_launch_can_be_cancelled(tmp_path: Path) -> None:
    script = write(tmp_path, "train.py", "import time\nprint('here', flush=True)\ntime.sleep(1000)")
    launcher = Launcher(
        defaults=LaunchDefaults(artifacts=tmp_path / "launched"),
        cancelled=lambda: any(path.read_text() for path in tmp_path.glob("launched/*/rank0/stdout.log")),
    )
    with pytest.raises(LaunchCancelled):
        launcher.torchrun(script, nproc=1, timeout=100)
    assert launch.torchrun(write(tmp_path, "next.py", "print(1)"), nproc=1, timeout=100).passed


def test_a_script_can_start_data_loader_workers(tmp_path: Path) -> None:
    script = write(
        tmp_path,
        "data.py",
        """
        import torch, torch.distributed as dist
        from torch.utils.data import DataLoader
        class Numbers(torch.utils.data.Dataset):
            def __len__(self): return 8
            def __getitem__(self, index): return index
        if __name__ == "__main__":
            dist.init_process_group("gloo")
            for context in ("fork", "spawn"):
                loader = DataLoader(Numbers(), batch_size=4, num_workers=1, multiprocessing_context=context)
                print(sum(int(batch.sum()) for batch in loader))
        """,
    )
    result = launch.torchrun(script, nproc=1, timeout=100)
    assert without_gloo(result.ranks[0].stdout).split() == ["28", "28"]


def test_no_folder_of_torchrun_is_left(tmp_path: Path) -> None:
    script, temporary = write(tmp_path, "train.py", "print(1)"), tmp_path / "tmp"
    temporary.mkdir()
    program = f"from pytest_gputrain import launch; launch.torchrun({str(script)!r}, timeout=100)"
    # In a process with a temporary folder of its own: others' torchruns come and go in the common one.
    environ = {**os.environ, "TMPDIR": str(temporary), "PYTHONPATH": str(Path(__file__).parents[2])}
    subprocess.run([sys.executable, "-c", program], env=environ, check=True, timeout=200)
    left = [path.name for path in temporary.iterdir()]
    assert not [name for name in left if name.startswith(("torchelastic", "gputrain"))]
