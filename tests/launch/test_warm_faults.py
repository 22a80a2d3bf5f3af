"""Many warm launches in a row with random faults between them: no verdict is wrong, and nothing grows."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import threading
import time
from collections.abc import Callable
from typing import Any

import psutil
import pytest

from pytest_gputrain import launch
from pytest_gputrain.launch import LaunchResult, Verdict, warm


def rank() -> int:
    return int(os.environ["RANK"])


def healthy(number: int) -> float:
    import torch
    import torch.distributed as dist

    # What any of the faults below would show, if it had been left to this call.
    assert torch.get_default_dtype() == torch.float32 and torch.is_grad_enabled()
    assert "LAUNCH_TEST_LEFT" not in os.environ and threading.active_count() == 1
    assert os.getcwd() != "/" and signal.getsignal(signal.SIGUSR2) is signal.SIG_DFL
    total = torch.full((2,), float(number))
    dist.all_reduce(total)
    print(f"number {number}")
    return float(total.sum())


def raises() -> None:
    if rank() == 1:
        raise ValueError("boom")


def exits() -> None:
    if rank() == 0:
        os._exit(0)


def is_killed() -> None:
    if rank() == 1:
        os.kill(os.getpid(), signal.SIGKILL)


def hangs() -> None:
    time.sleep(600)


def is_uneven() -> None:
    import torch
    import torch.distributed as dist

    if rank() == 0:
        dist.all_reduce(torch.ones(1))


def skips() -> None:
    pytest.skip("no data")


def leaves_work() -> None:
    import torch
    import torch.distributed as dist

    dist.irecv(torch.ones(1), 1 - rank())


def leaves_a_thread() -> None:
    threading.Thread(target=time.sleep, args=(600,), daemon=True).start()


def leaves_a_variable() -> None:
    os.environ["LAUNCH_TEST_LEFT"] = "1"


def leaves_a_directory() -> None:
    os.chdir("/")


def leaves_a_dtype() -> None:
    import torch

    torch.set_default_dtype(torch.float64)


def leaves_grad_off() -> None:
    import torch

    torch.set_grad_enabled(False)


def leaves_a_handler() -> None:
    signal.signal(signal.SIGUSR2, signal.SIG_IGN)


FAULTS: list[tuple[Callable[[], Any], Verdict, float]] = [  # with the share of each among the faults
    (raises, Verdict.FAILED, 2),
    (exits, Verdict.CRASHED, 2),
    (is_killed, Verdict.CRASHED, 2),
    (hangs, Verdict.HUNG, 0.4),
    (is_uneven, Verdict.HUNG, 0.4),
    (skips, Verdict.SKIPPED, 1),
    (leaves_work, Verdict.PASSED, 1),
    (leaves_a_thread, Verdict.PASSED, 0.4),
    (leaves_a_variable, Verdict.PASSED, 1),
    (leaves_a_directory, Verdict.PASSED, 1),
    (leaves_a_dtype, Verdict.PASSED, 1),
    (leaves_grad_off, Verdict.PASSED, 1),
    (leaves_a_handler, Verdict.PASSED, 1),
]


def run(target: Callable[..., Any], *args: Any) -> LaunchResult:
    result: LaunchResult = launch(
        target, *args, isolation="warm", check=False, timeout=60, stall=2 if target is hangs else 30
    )
    return result


def size() -> tuple[int, int]:
    """Open files and bytes in memory of this process and its fork servers, ranks aside."""
    mine = psutil.Process()
    processes = [mine, *mine.children()]
    return sum(p.num_fds() for p in processes), sum(p.memory_info().rss for p in processes)


def one_in_ten(draw: random.Random, number: int) -> None:
    if number % 10 == 9:
        fault, verdict, _ = draw.choices(FAULTS, [share for *_, share in FAULTS])[0]
        result = run(fault)
        assert result.verdict is verdict, (number, fault.__name__, result.summary())
        assert result.recycled, (number, fault.__name__)
    elif number % 97 == 0 and (idle := warm.POOL.pids()):
        with contextlib.suppress(ProcessLookupError):  # killed already, and not yet asked to run anything
            os.kill(draw.choice(idle), signal.SIGKILL)
    result = run(healthy, number)
    assert result.passed, (number, result.summary())
    assert result.recycled is None, (number, result.recycled)
    assert result.values == [4.0 * number] * 2
    assert [rank.stdout for rank in result.ranks] == [f"number {number}\n"] * 2


@pytest.mark.timeout(900)
@pytest.mark.parametrize("times", [60, pytest.param(1000, marks=pytest.mark.nightly)])
def test_one_fault_in_ten_never_spoils_another_launch(times: int) -> None:
    draw = random.Random(times)
    warm.POOL.close()  # what other tests have left would count as this one's
    for number in range(20):
        one_in_ten(draw, number)
    files, memory = size()
    for number in range(20, times):
        one_in_ten(draw, number)
    files_after, memory_after = size()
    assert files_after <= files + 4
    assert memory_after <= memory + (64 << 20)
