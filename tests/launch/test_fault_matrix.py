"""One program a fault, with real processes: the right verdict, cause and rank, in bounded time."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import time
import unittest
from collections.abc import Callable
from typing import Any

import pytest

from pytest_gputrain import launch
from pytest_gputrain.launch import LaunchResult, Verdict


def wait_for_all() -> None:
    import torch
    import torch.distributed as dist

    dist.all_reduce(torch.ones(3))


def is_rank(number: int) -> bool:
    return os.environ["RANK"] == str(number)


def run(target: Callable[[], Any], timeout: float = 60, within: float = 30, **options: Any) -> LaunchResult:
    """The launch's result, with the verdict given within ``within`` seconds of the fork.

    A busy machine needs some of them; the deadline that nothing here may wait for is twice as far.
    """
    result: LaunchResult = launch(target, timeout=timeout, check=False, **options)
    assert result.seconds < within
    return result


def test_an_exception_on_one_rank_while_the_other_waits() -> None:
    def program() -> None:
        if is_rank(1):
            raise ValueError("boom")
        wait_for_all()

    result = run(program)
    assert result.verdict is Verdict.FAILED
    assert str(result.cause).startswith("rank 1 raised ValueError: boom   at ")
    assert "in program" in str(result.cause)
    assert result.ranks[0].state == "ended"
    assert result.ranks[0].in_collective
    assert "rank 0: waits in all_reduce #1 (3 x float32)" in result.summary()


def test_an_exception_on_all_ranks_is_shown_once() -> None:
    def program() -> None:
        raise ValueError("everybody")

    result = run(program)
    assert result.verdict is Verdict.FAILED
    assert [rank.state for rank in result.ranks] == ["failed", "failed"]
    assert result.summary().count("Traceback (most recent call last)") == 1
    assert "--- ranks 0-1" in result.summary()


def test_sys_exit_3() -> None:
    def program() -> None:
        if is_rank(1):
            sys.exit(3)
        wait_for_all()

    result = run(program)
    assert result.verdict is Verdict.FAILED
    assert (result.cause and result.cause.rank, result.cause and result.cause.kind) == (1, "exit")
    assert "sys.exit(3)" in str(result.cause)


def test_sys_exit_0_is_no_success_of_a_function() -> None:
    def program() -> None:
        sys.exit(0)

    assert run(program).verdict is Verdict.FAILED


@pytest.mark.parametrize("code", [0, 7])
def test_os_exit_midway(code: int) -> None:
    def program() -> None:
        if is_rank(1):
            os._exit(code)
        wait_for_all()

    result = run(program)
    assert result.verdict is Verdict.CRASHED
    assert result.cause is not None and result.cause.rank == 1
    assert f"exit code {code}" in result.cause.message
    assert result.ranks[1].exit_code == code


@pytest.mark.parametrize("name", ["SIGKILL", "SIGSEGV", "SIGABRT"])
def test_a_signal_is_named(name: str) -> None:
    def program() -> None:
        if is_rank(0):
            os.kill(os.getpid(), getattr(signal, name))
            time.sleep(60)
        wait_for_all()

    result = run(program)
    assert result.verdict is Verdict.CRASHED
    assert result.cause is not None and result.cause.rank == 0
    assert result.cause.message == f"rank 0 was killed by {name}"
    assert result.ranks[0].signal == name


def test_a_segmentation_fault_names_the_line() -> None:
    def program() -> None:
        if is_rank(1):
            ctypes.string_at(0)

    result = run(program)
    assert result.verdict is Verdict.CRASHED
    assert "test_fault_matrix.py:" in str(result.cause)


def test_sigterm_ignored() -> None:
    def program() -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        if is_rank(1):
            raise ValueError("boom")
        time.sleep(600)

    result = run(program)
    assert result.cause is not None and result.cause.rank == 1


def test_an_infinite_python_loop_is_timed_out_with_its_line() -> None:
    def program() -> None:
        while True:
            pass

    result = run(program, timeout=3)
    assert result.verdict is Verdict.TIMED_OUT
    assert "in program" in str(result.cause)
    assert "in program" in result.ranks[0].stacks and "in program" in result.ranks[1].stacks


def test_an_infinite_sleep_in_c_is_hung_with_its_line() -> None:
    def program() -> None:
        ctypes.CDLL(None).sleep(10_000)

    result = run(program, timeout=3)
    assert result.verdict is Verdict.HUNG
    assert "stopped moving" in str(result.cause) and "in program" in str(result.cause)
    assert all("in program" in rank.stacks for rank in result.ranks)


def test_a_loop_on_one_rank_holds_up_the_other() -> None:
    def program() -> None:
        while is_rank(1):
            pass
        wait_for_all()

    result = run(program, timeout=3)
    assert result.verdict is Verdict.TIMED_OUT
    assert result.cause is not None and result.cause.rank == 1


def test_a_collective_that_nobody_joins_is_hung_long_before_the_deadline() -> None:
    def program() -> None:
        if is_rank(0):
            wait_for_all()

    result = run(program)
    assert result.verdict is Verdict.HUNG
    assert result.cause is not None and result.cause.rank == 1
    assert "rank 1 never reached all_reduce #1 (3 x float32); it returned" in str(result.cause)
    assert "in wait_for_all" in result.summary()


def test_ranks_that_wait_for_each_other_are_hung_long_before_the_deadline() -> None:
    def program() -> None:
        import torch
        import torch.distributed as dist

        if is_rank(0):
            dist.recv(torch.ones(3), src=1)
        wait_for_all()

    result = run(program)
    assert result.verdict is Verdict.HUNG
    assert result.cause is not None and result.cause.kind == "deadlock"
    assert "likely: ranks entered different collectives" in result.summary()


def test_a_rank_that_works_on_after_the_other_finished_is_no_hang() -> None:
    def program() -> int:
        if is_rank(0):
            until = time.monotonic() + 2.5
            while time.monotonic() < until:
                time.sleep(0.01)
        return 1

    assert run(program).values == [1, 1]


def test_ranks_that_wait_for_a_side_thread_are_not_hung() -> None:
    def program() -> int:
        import threading

        import torch
        import torch.distributed as dist

        group = dist.new_group()

        def send_later() -> None:
            time.sleep(8)
            dist.send(torch.ones(1), 0, group=group)

        if is_rank(1):
            thread = threading.Thread(target=send_later)
            thread.start()
        else:
            dist.recv(torch.ones(1), 1, group=group)
        dist.barrier()
        return 1

    assert run(program).values == [1, 1]


def test_local_work_after_a_late_collective_is_no_hang() -> None:
    def program() -> int:
        import torch
        import torch.distributed as dist

        model, x = torch.nn.Linear(600, 600), torch.randn(600, 600)
        if is_rank(0):
            time.sleep(1.3)  # long still when the other rank finishes
        dist.barrier()
        if is_rank(0):
            for _ in range(10):
                x = model(x)
            x.sum().backward()
        return 1

    for _ in range(6):
        assert run(program).values == [1, 1]


def test_no_progress_for_stall_seconds_is_hung() -> None:
    def program() -> None:
        time.sleep(60)

    result = run(program, stall=1.0)
    assert result.verdict is Verdict.HUNG


def test_starting_the_fork_server_is_not_standing_still() -> None:
    def program() -> None:
        time.sleep(0.2)

    assert run(program, stall=0.5, env={"PYTHONHASHSEED": "77"}).passed  # a server of its own


def test_one_rank_skips_while_another_fails() -> None:
    def program() -> None:
        if is_rank(0):
            raise unittest.SkipTest("no data")
        raise ValueError("boom")

    result = run(program)
    assert (result.verdict, result.cause and result.cause.rank) == (Verdict.FAILED, 1)


def test_one_rank_skips_while_another_passes() -> None:
    def program() -> None:
        if is_rank(0):
            pytest.skip("no data")

    result = run(program)
    assert result.verdict is Verdict.FAILED
    assert "rank 0 skipped (no data) while rank 1 ran" in str(result.cause)


def test_all_skip() -> None:
    def program() -> None:
        pytest.skip("no data")

    result = run(program)
    assert result.verdict is Verdict.SKIPPED
    assert result.summary().startswith("SKIPPED: no data")


def test_an_unpicklable_return_value_names_rank_and_type() -> None:
    def program() -> Any:
        import threading

        return threading.Lock() if is_rank(1) else 0

    result = run(program)
    assert result.verdict is Verdict.FAILED
    assert result.cause is not None and result.cause.rank == 1
    assert "rank 1 returned a _thread.lock, which cannot be pickled" in str(result.cause)


def test_an_unpicklable_exception() -> None:
    class Stubborn(Exception):
        def __reduce__(self) -> Any:
            raise RuntimeError("not me")

    def program() -> None:
        raise Stubborn("boom")

    result = run(program)
    assert result.verdict is Verdict.FAILED
    assert "Stubborn: boom" in str(result.cause)


def test_an_exception_whose_str_raises() -> None:
    class Mute(Exception):
        def __str__(self) -> str:
            raise RuntimeError("no")

    def program() -> None:
        raise Mute

    result = run(program)
    assert result.verdict is Verdict.FAILED
    assert "<Mute whose __str__ raised RuntimeError>" in str(result.cause)


def test_100_mb_on_stdout_fill_neither_memory_nor_disk() -> None:
    def program() -> None:
        print("first words")
        for _ in range(1000):
            sys.stdout.write("x" * 100_000 + "\n")
        print("last words")
        time.sleep(0.6)

    result = run(program)
    assert result.passed
    for rank in result.ranks:
        assert rank.stdout.startswith("first words") and rank.stdout.endswith("last words\n")
        assert len(rank.stdout) < 300_000
        assert "bytes cut here by pytest-gputrain" in rank.stdout
    size = sum(path.stat().st_blocks * 512 for path in result.artifacts.rglob("*") if path.is_file())
    assert size < 2_000_000


def test_a_grandchild_in_a_session_of_its_own_is_ended_and_named() -> None:
    def program() -> int:
        return subprocess.Popen(["sleep", "1234"], start_new_session=True).pid

    result = run(program)
    assert result.passed
    for pid in result.values:
        assert not os.path.exists(f"/proc/{pid}")
    assert any("sleep 1234" in line for line in result.leftovers)


def test_a_daemon_that_was_orphaned_on_purpose_is_ended() -> None:
    def program() -> int:
        script = (
            "import os, time\nif os.fork() == 0:\n os.setsid()\n if os.fork() == 0:\n  time.sleep(1234)\n"
        )
        subprocess.run([sys.executable, "-c", script], check=True)
        raise ValueError("boom")

    assert run(program).verdict is Verdict.FAILED  # conftest looks for what is left


def test_a_forked_copy_of_a_rank_does_not_report() -> None:
    def program() -> int:
        pid = os.fork()
        if pid:
            os.waitpid(pid, 0)
        return os.getpid()

    result = run(program)
    assert result.passed
    assert result.values == [rank.pid for rank in result.ranks]


def test_a_rank_that_is_stopped_gets_a_verdict() -> None:
    def program() -> None:
        if is_rank(1):
            os.kill(os.getpid(), signal.SIGSTOP)
        wait_for_all()

    result = run(program, timeout=3)
    assert result.verdict is Verdict.HUNG
    assert "stopped by a signal" in result.ranks[1].stacks


def test_the_group_timeout_of_a_user_is_a_hang_blamed_on_the_absent_rank() -> None:
    def program() -> None:
        import datetime

        import torch
        import torch.distributed as dist

        group = dist.new_group(timeout=datetime.timedelta(seconds=1))
        if is_rank(1):
            time.sleep(30)
        dist.all_reduce(torch.ones(1), group=group)

    result = run(program)
    assert result.verdict is Verdict.HUNG
    assert result.cause is not None and result.cause.rank == 1


def test_teardown_noise_after_the_report_is_no_verdict() -> None:
    def program() -> int:
        import threading

        def crash_later() -> None:
            time.sleep(0.6)  # by then a busy machine has let it report
            os.kill(os.getpid(), signal.SIGABRT)

        if is_rank(0):
            threading.Thread(target=crash_later, daemon=True).start()
        else:
            time.sleep(1.5)
        return 1

    assert run(program).values == [1, 1]
