"""Nothing outlives a launch: not after KeyboardInterrupt, not after SIGKILL of pytest, server or torchrun."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
import uuid
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from pytest_gputrain import launch
from pytest_gputrain.launch import Verdict, warm

MARK = "LAUNCH_TEST_SURVIVORS"

TEST_FILE = """
import os, subprocess, time

def hang():
    subprocess.Popen(["sleep", "1234"], start_new_session=True)
    open(os.environ["READY"] + os.environ["RANK"], "w").close()
    while True:
        time.sleep(0.01)

def test_hang(ddp_launcher):
    ddp_launcher(hang, timeout=120)
"""

SCRIPT = """
import os, subprocess, time
subprocess.Popen(["sleep", "1234"], start_new_session=True)
open(os.environ["READY"] + os.environ["RANK"], "w").close()
time.sleep(1000)
"""


def marked(mark: str) -> list[psutil.Process]:
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get(MARK) == mark and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except (psutil.Error, OSError):
            continue
    return found


def wait_until(condition: Callable[[], bool], seconds: float) -> bool:
    limit = time.monotonic() + seconds
    while time.monotonic() < limit:
        if condition():
            return True
        time.sleep(0.05)
    return condition()


class Session:
    """A pytest process that hangs in a launch of two ranks, each with a grandchild in its own session."""

    def __init__(self, folder: Path, *options: str, text: str = TEST_FILE) -> None:
        self.mark = uuid.uuid4().hex
        folder.mkdir()
        (folder / "test_hang.py").write_text(textwrap.dedent(text))
        (folder / "tmp").mkdir()
        self.temporary = folder / "tmp"
        environ = {
            **os.environ,
            MARK: self.mark,
            "READY": str(folder / "ready"),
            "TMPDIR": str(folder / "tmp"),
        }
        root = Path(__file__).parents[2]
        environ["PYTHONPATH"] = str(root)
        arguments = [
            "-p",
            "pytest_gputrain",
            "-p",
            "no:cacheprovider",
            "--disable-plugin-autoload",
            "-q",
            *options,
        ]
        self.process = subprocess.Popen(
            [sys.executable, "-m", "pytest", *arguments, f"--rootdir={folder}", str(folder)],
            env=environ, cwd=folder,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL,
        )  # fmt: skip
        self._ready = [folder / f"ready{rank}" for rank in range(2)]

    def wait_for_ranks(self, processes: int = 6) -> None:
        assert wait_until(lambda: all(path.exists() for path in self._ready), 120), self.process.poll()
        assert len(marked(self.mark)) >= processes  # pytest, server, two ranks, two grandchildren

    def finish(self) -> str:
        output, _ = self.process.communicate(timeout=250)
        return output.decode()


@pytest.mark.timeout(600)  # twenty sessions, each of which imports torch
@pytest.mark.parametrize("times", [2, pytest.param(20, marks=pytest.mark.nightly)])
def test_sigkill_of_pytest(times: int, tmp_path: Path) -> None:
    for first in range(0, times, 2):  # two at a time: they are independent, and importing torch is slow
        sessions = [Session(tmp_path / str(number)) for number in range(first, first + 2)]
        for session in sessions:
            session.wait_for_ranks()
            session.process.kill()
        for session in sessions:
            assert wait_until(lambda s=session: not marked(s.mark), 60), marked(session.mark)  # type: ignore[misc]
            session.finish()
            assert not list(session.temporary.glob("gputrain-*"))


def test_sigkill_of_an_xdist_worker(tmp_path: Path) -> None:
    session = Session(tmp_path / "s", "-p", "xdist", "-n", "1", "--max-worker-restart=0")
    session.wait_for_ranks()
    workers = psutil.Process(session.process.pid).children()
    next(worker for worker in workers if worker.children()).kill()
    output = session.finish()
    assert "crashed while running" in output
    assert session.process.returncode == 1
    assert wait_until(lambda: not marked(session.mark), 60), marked(session.mark)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_and_sigterm_in_pytest(number: signal.Signals, tmp_path: Path) -> None:
    session = Session(tmp_path / "s")
    session.wait_for_ranks()
    session.process.send_signal(number)
    output = session.finish()
    if number == signal.SIGINT:
        assert "KeyboardInterrupt" in output
        assert session.process.returncode == 2
    assert wait_until(lambda: not marked(session.mark), 60), marked(session.mark)


@pytest.fixture
def no_idle_ranks() -> None:
    """Those that tests before have left would be taken for the ranks to kill."""
    warm.POOL.close()


@pytest.mark.usefixtures("no_idle_ranks")
@pytest.mark.parametrize("times", [3, pytest.param(20, marks=pytest.mark.nightly)])
def test_sigkill_of_torchrun(times: int, tmp_path: Path) -> None:
    script = tmp_path / "hang.py"
    script.write_text(SCRIPT)
    for turn in range(times):
        ready = tmp_path / f"ready-{turn}-"
        killer = threading.Thread(target=_kill_agent, args=(ready,))
        killer.start()
        result = launch.torchrun(script, timeout=120, check=False, env={"READY": str(ready)})
        killer.join(60)
        assert result.verdict is Verdict.CRASHED
        assert "torchrun was killed by SIGKILL" in str(result.cause)
        assert result.seconds < 60
        _no_child_of_a_server()


def _kill_agent(ready: Path) -> None:
    assert wait_until(lambda: all(Path(f"{ready}{rank}").exists() for rank in range(2)), 60)
    for server in psutil.Process().children():
        for agent in server.children():
            if len(agent.children()) >= 2:
                agent.kill()


def _no_child_of_a_server() -> None:
    for server in psutil.Process().children():
        assert server.children(recursive=True) == []


@pytest.mark.usefixtures("no_idle_ranks")
def test_sigkill_of_the_fork_server(tmp_path: Path) -> None:
    ready = tmp_path / "ready"
    mark = uuid.uuid4().hex

    def program() -> None:
        subprocess.Popen(["sleep", "1234"], start_new_session=True)
        Path(f"{ready}{os.environ['RANK']}").touch()
        time.sleep(600)

    def kill() -> None:
        assert wait_until(lambda: all(Path(f"{ready}{rank}").exists() for rank in range(2)), 60)
        next(server for server in psutil.Process().children() if server.children()).kill()

    killer = threading.Thread(target=kill)
    killer.start()
    result = launch(program, timeout=120, check=False, env={MARK: mark})
    killer.join(60)
    assert result.verdict is Verdict.CRASHED
    assert "the process that forks the ranks died" in str(result.cause)
    assert wait_until(lambda: not marked(mark), 60), marked(mark)
    assert launch(lambda: 1).values == [1, 1]  # the next launch gets a new server


def test_an_exception_in_the_waiting_process_ends_the_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    from pytest_gputrain.launch import supervise

    mark = uuid.uuid4().hex

    def interrupted(self: object) -> bool:
        raise KeyboardInterrupt

    monkeypatch.setattr(supervise.Supervision, "_failed", interrupted)
    with pytest.raises(KeyboardInterrupt):
        launch(lambda: time.sleep(600), env={MARK: mark})
    assert marked(mark) == []


def test_fifty_launches_leave_memory_files_and_processes_flat() -> None:
    launch(lambda: None)
    me = psutil.Process()
    files, memory = me.num_fds(), me.memory_info().rss
    for turn in range(50):
        result = launch(lambda turn=turn: turn, check=False)
        assert result.values == [turn, turn]
    del result
    assert me.num_fds() <= files
    assert me.memory_info().rss - memory < 20_000_000
    for place in (tempfile.gettempdir(), "/dev/shm"):
        assert list(Path(place).glob(f"gputrain-{os.getpid()}-*")) == []


@pytest.mark.parametrize("number", [signal.SIGKILL, pytest.param(signal.SIGTERM, marks=pytest.mark.nightly)])
def test_what_the_results_of_a_killed_process_kept_is_removed(number: int) -> None:
    program = (
        "import os; from pytest_gputrain import launch; kept = [launch(int) for _ in range(2)]\n"
        "warm = [launch(int, isolation='warm') for _ in range(2)]\n"
        "print(*(result.artifacts for result in kept + warm), flush=True)\n"
        f"assert kept[0].artifacts.is_dir(); os.kill(os.getpid(), {number:d})\n"
    )
    environ = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run(
        [sys.executable, "-c", program], env=environ, stdout=subprocess.PIPE, text=True, timeout=200
    )
    folders = [Path(text) for text in done.stdout.split()]
    assert len(folders) == 4
    assert wait_until(lambda: not any(folder.exists() for folder in folders), 60)
