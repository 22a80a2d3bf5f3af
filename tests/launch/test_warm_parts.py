"""What makes a warm call cheap: told what has changed, folders on demand, a second look after the report."""

from __future__ import annotations

import os
import pickle
import signal
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from pytest_gputrain import launch
from pytest_gputrain.launch import LaunchDefaults, Launcher, process, surroundings, warm
from pytest_gputrain.launch.aftermath import Aftermath
from pytest_gputrain.launch.folder import Folder


def warm_launch(target: Any, *args: Any, **options: Any) -> Any:
    return launch(target, *args, isolation="warm", world_size=1, **options)


def leaves_an_argument() -> None:
    sys.argv.append("--left")


# -- the environment ----------------------------------------------------------------------------------


def test_own_is_this_processs_environment_as_it_is_now(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LAUNCH_TEST_A", "1")
    assert surroundings.own() == dict(os.environ)
    monkeypatch.setenv("LAUNCH_TEST_A", "2")
    monkeypatch.setenv("LAUNCH_TEST_B", os.fsdecode(b"\xff"))
    assert surroundings.own() == dict(os.environ)
    monkeypatch.delenv("LAUNCH_TEST_A")
    surroundings.own().clear()  # the caller's
    assert surroundings.own() == dict(os.environ)


def test_a_change_is_what_differs() -> None:
    before, now = {"a": "1", "b": "2", "c": "3"}, {"a": "1", "b": "4", "d": "5"}
    changed = surroundings.change(now, before)
    assert changed == {"b": "4", "c": None, "d": "5"}
    assert surroundings.patched(before, changed) == now
    assert surroundings.change(now, dict(now)) == {}


def test_a_remembered_function_is_asked_again_when_what_it_reads_has_changed() -> None:
    asked = []

    @surroundings.reads(lambda name: name.startswith("OMP_"))
    def threads(environ: Any) -> str:
        asked.append(environ)
        return str(environ.get("OMP_NUM_THREADS"))

    assert threads({"OMP_NUM_THREADS": "1"}) == threads({"OMP_NUM_THREADS": "1", "OTHER": "x"}) == "1"
    assert len(asked) == 1
    assert [threads({"OMP_NUM_THREADS": "2"}), threads({})] == ["2", "None"]
    assert len(asked) == 3


# -- folders -------------------------------------------------------------------------------------------


def test_a_silent_call_has_a_folder_when_it_is_asked_for(tmp_path: Path) -> None:
    launcher = Launcher(defaults=LaunchDefaults(artifacts=tmp_path / "a"))
    silent = launcher(int, isolation="warm", world_size=1)
    printing = launcher(lambda: print("hello"), isolation="warm", world_size=1)
    launcher(int, isolation="warm", world_size=1)
    assert list((tmp_path / "a").iterdir()) == [printing.artifacts]
    assert (printing.artifacts / "rank0" / "stdout.log").read_text() == "hello\n"
    files = {path.name: path.read_text() for path in (silent.artifacts / "rank0").iterdir()}
    assert files == dict.fromkeys(("stdout.log", "stderr.log", "crash.txt", "stacks.txt"), "")


def test_files_of_ranks_that_were_ended_are_with_the_result(tmp_path: Path) -> None:
    def program() -> None:
        print("last words")
        os.kill(os.getpid(), signal.SIGABRT)

    launcher = Launcher(defaults=LaunchDefaults(artifacts=tmp_path))
    result = launcher(program, isolation="warm", world_size=1, check=False)
    assert (result.artifacts / "rank0" / "stdout.log").read_text() == "last words\n"
    assert "SIGABRT" in str(result.cause) or "Abort" in (result.artifacts / "rank0" / "crash.txt").read_text()


def test_a_stream_that_a_call_has_put_to_other_use_is_the_ranks_again() -> None:
    def program() -> None:
        os.close(2)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)

    assert warm_launch(program).recycled is None
    after = warm_launch(lambda: os.write(1, b"out") + os.write(2, b"err!"))
    assert (after.ranks[0].stdout, after.ranks[0].stderr) == ("out", "err!")


def test_a_temporary_folder_goes_with_its_object_and_a_copy_does_not_own_it() -> None:
    folder = Folder(None, "name")
    path = folder.path()
    copy = pickle.loads(pickle.dumps(folder))
    assert copy.path() == path
    del copy
    assert path.is_dir()
    del folder
    assert not path.exists()


# -- what comes out after the report ---------------------------------------------------------------------


def test_what_a_call_left_is_its_own_reason_whoever_asks_first() -> None:
    asked = warm_launch(leaves_an_argument)
    assert "sys.argv: changed" in asked.recycled and warm.POOL.recycled[-1] == asked.recycled
    found_by_the_next = warm_launch(leaves_an_argument)
    following = warm_launch(lambda: list(sys.argv))
    assert following.values == [sys.argv]
    assert "sys.argv: changed" in found_by_the_next.recycled
    assert following.recycled is None


def test_a_reason_crosses_processes() -> None:
    result = warm_launch(leaves_an_argument)
    assert "sys.argv: changed" in pickle.loads(pickle.dumps(result)).recycled


def test_threads_may_ask_at_once() -> None:
    result = warm_launch(leaves_an_argument)
    reasons: list[str | None] = []
    threads = [threading.Thread(target=lambda: reasons.append(result.recycled)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(reasons) == 4 and len(set(reasons)) == 1 and reasons[0]


def test_an_aftermath_waits_once() -> None:
    waits = []

    def wait() -> None:
        waits.append(1)
        found.settle("left something")

    found = Aftermath(wait=wait)
    assert not found.settled
    assert found.reason() == found.reason() == "left something"
    assert waits == [1] and found.settled


def test_a_file_of_proc_knows_when_its_process_is_gone() -> None:
    pid = os.fork()
    if pid == 0:
        signal.pause()
        os._exit(0)
    status = process.ProcFile(f"/proc/{pid}/status")
    assert process.trouble(status.read()) is None
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    assert status.read() is None and process.trouble(None) == "died"
    status.close()
