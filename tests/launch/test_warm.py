"""Warm launches keep what fresh ones promise: verdicts, values, output, environment, and no left-overs."""

from __future__ import annotations

import os
import random
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from pytest_gputrain import launch
from pytest_gputrain.launch import LaunchError, LaunchResult, Verdict, client, warm, warm_watch
from tests.launch.test_nothing_survives import Session, marked, wait_until
from tests.launch.torchs_own import without_gloo


@pytest.fixture
def pool() -> Iterator[warm.WarmPool]:
    """The pool, empty before and after."""
    warm.POOL.close()
    warm.POOL.recycled.clear()
    yield warm.POOL
    warm.POOL.close()


def run(target: Callable[..., Any], *args: Any, **options: Any) -> LaunchResult:
    result: LaunchResult = launch(target, *args, isolation="warm", check=False, **options)
    return result


def healthy() -> int:
    import torch
    import torch.distributed as dist

    total = torch.ones(1)
    dist.all_reduce(total)
    assert total.item() == dist.get_world_size()
    return os.getpid()


def is_rank(number: int) -> bool:
    return os.environ["RANK"] == str(number)


def wait_for_all() -> None:
    import torch
    import torch.distributed as dist

    dist.all_reduce(torch.ones(1))


# -- what comes back ------------------------------------------------------------------------------------


def test_values_output_and_arguments_are_this_calls() -> None:
    factor = 3

    def program(number: int, *, plus: int) -> int:
        print(f"out {number}")
        print(f"err {number}", file=sys.stderr)
        return number * factor + plus + int(os.environ["RANK"])

    for number in range(4):
        result = run(program, number, plus=10)
        assert result.values == [number * 3 + 10, number * 3 + 11]
        for rank in result.ranks:
            assert (without_gloo(rank.stdout), rank.stderr) == (f"out {number}\n", f"err {number}\n")
            log = result.artifacts / f"rank{rank.rank}" / "stdout.log"
            assert without_gloo(log.read_text()) == f"out {number}\n"


def test_what_a_fresh_rank_finds_a_warm_one_finds(
    pool: warm.WarmPool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def program() -> dict[str, Any]:
        environ = dict(os.environ)
        for own in ("MASTER_PORT", "GPUTRAIN_LAUNCH"):
            environ.pop(own)
        return {"environ": environ, "cwd": os.getcwd(), "argv": sys.argv, "path": sys.path}

    for number in range(3):
        monkeypatch.setenv("LAUNCH_TEST_NUMBER", str(number))
        folder = tmp_path / str(number)
        folder.mkdir()
        monkeypatch.chdir(folder)
        monkeypatch.setattr(sys, "argv", ["program", str(number)])
        options: dict[str, Any] = {"env": {"LAUNCH_TEST_A": str(number), "HOME": None}}
        assert run(program, **options).values == launch(program, **options).values
    assert len(pool.pids()) == 2
    assert not pool.recycled


def test_unseeded_numbers_are_new_in_every_call_and_rank() -> None:
    def program() -> tuple[float, float, float]:
        import numpy as np
        import torch

        drawn = torch.rand(1).item(), random.random(), float(np.random.rand())
        torch.manual_seed(1), random.seed(1), np.random.seed(1)
        return drawn

    drawn = [value for _ in range(3) for value in run(program).values]
    assert len({number for numbers in drawn for number in numbers}) == 18


def test_variables_that_are_read_at_the_start_get_ranks_of_their_own(pool: warm.WarmPool) -> None:
    def program() -> tuple[int, int]:
        import torch

        return torch.get_num_threads(), os.getpid()

    one = run(program).values
    two = run(program, env={"OMP_NUM_THREADS": "2"}).values
    again = run(program).values
    assert [value[0] for value in one + two] == [1, 1, 2, 2]
    assert again == one
    assert len(pool.pids()) == 4


def test_other_sizes_and_search_paths_get_ranks_of_their_own(
    pool: warm.WarmPool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    pids = [run(healthy, world_size=size).values for size in (1, 2)]
    monkeypatch.syspath_prepend(str(tmp_path))
    pids.append(run(healthy).values)
    assert len({pid for values in pids for pid in values}) == 1 + 2 + 2
    assert len(pool.pids()) == 5


def test_the_pool_is_bounded(pool: warm.WarmPool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(warm, "MOST_IDLE_RANKS", 4)
    first = run(healthy, world_size=1).values
    run(healthy, world_size=2)
    last = run(healthy, world_size=3).values
    assert pool.pids() == last
    assert "unused for longest" in pool.recycled[-1]
    assert not set(map(psutil.pid_exists, first)) & {True}


def test_launches_of_several_threads_do_not_share_ranks(pool: warm.WarmPool) -> None:
    def program() -> int:
        time.sleep(0.3)
        return healthy()

    results: list[LaunchResult] = []
    threads = [threading.Thread(target=lambda: results.append(run(program))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert [result.verdict for result in results] == [Verdict.PASSED] * 3
    assert len(pool.pids()) == len(set(pool.pids())) >= 2


# -- verdicts -------------------------------------------------------------------------------------------


def raises() -> None:
    if is_rank(1):
        raise ValueError("boom")
    wait_for_all()


def exits() -> None:
    if is_rank(1):
        sys.exit(3)
    wait_for_all()


def leaves_behind_pythons_back() -> None:
    if is_rank(1):
        os._exit(0)
    wait_for_all()


def is_killed() -> None:
    if is_rank(0):
        os.kill(os.getpid(), signal.SIGKILL)
    wait_for_all()


def does_not_come() -> None:
    if is_rank(0):
        wait_for_all()


def stops_moving() -> None:
    time.sleep(600)


def loops() -> None:
    while True:
        pass


def skips() -> None:
    pytest.skip("no data")


def one_skips() -> None:
    if is_rank(0):
        pytest.skip("no data")


def returns_what_cannot_travel() -> Any:
    return threading.Lock() if is_rank(1) else 0


def asserts() -> None:
    six = 6
    assert six == 3 * 7


VERDICTS: list[tuple[Callable[[], Any], Verdict, str, dict[str, float]]] = [
    (raises, Verdict.FAILED, "rank 1 raised ValueError: boom", {}),
    (exits, Verdict.FAILED, "rank 1 raised SystemExit: sys.exit(3)", {}),
    (leaves_behind_pythons_back, Verdict.CRASHED, "rank 1 left with exit code 0 before it was done", {}),
    (is_killed, Verdict.CRASHED, "rank 0 was killed by SIGKILL", {}),
    (does_not_come, Verdict.HUNG, "rank 1 never reached all_reduce #", {}),
    (stops_moving, Verdict.HUNG, "stopped moving", {"stall": 1}),
    (loops, Verdict.TIMED_OUT, "rank 0 was still running after", {"timeout": 3}),
    (skips, Verdict.SKIPPED, "no data", {}),
    (one_skips, Verdict.FAILED, "rank 0 skipped (no data) while rank 1 ran", {}),
    (returns_what_cannot_travel, Verdict.FAILED, "rank 1 returned a _thread.lock", {}),
    (asserts, Verdict.FAILED, "assert 6 == (3 * 7)", {}),
]


# Of ranks that have served before, those that compute until the deadline are nightly.
@pytest.mark.parametrize(
    ("program", "verdict", "cause", "options", "used_before"),
    [
        pytest.param(
            *case, used,
            id=f"{'used' if used else 'new'}-{case[0].__name__}",
            marks=pytest.mark.nightly if used and case[0] is loops else (),
        )
        for used in (False, True)
        for case in VERDICTS
    ],
)  # fmt: skip
def test_a_verdict_is_a_fresh_launchs_and_the_next_call_gets_new_ranks(
    program: Callable[[], Any], verdict: Verdict, cause: str, options: dict[str, float], used_before: bool
) -> None:
    if used_before:
        before = run(healthy).values
    else:
        warm.POOL.close()
        before = []
    result = run(program, **{"timeout": 60, **options})
    assert result.verdict is verdict
    assert cause in str(result.cause)
    if before:
        assert [rank.pid for rank in result.ranks] == before
    assert result.recycled == warm.POOL.recycled[-1] == f"{verdict}: {result.cause}"
    assert not {rank.pid for rank in result.ranks} & set(run(healthy).values)


def test_with_check_a_failure_raises_with_the_cause_first() -> None:
    with pytest.raises(LaunchError, match=r"^FAILED after .* s: rank 1 raised ValueError: boom   at "):
        launch(raises, isolation="warm")


def test_a_call_may_take_longer_than_the_one_that_started_the_ranks() -> None:
    def program() -> Any:
        import torch
        import torch.distributed.distributed_c10d as c10d

        options = c10d._get_default_group()._get_backend(torch.device("cpu")).options
        assert options._timeout.total_seconds() > 600
        return healthy()

    warm.POOL.close()
    before = run(healthy, timeout=30).values
    assert run(program, timeout=600).values == before


# -- idle ranks -----------------------------------------------------------------------------------------


def test_a_rank_that_dies_while_idle_is_noticed(pool: warm.WarmPool) -> None:
    pids = run(healthy).values
    os.kill(pids[1], signal.SIGKILL)
    after = run(healthy)
    assert after.passed
    assert not set(after.values) & set(pids)
    assert list(pool.recycled) == [f"rank 1 (pid {pids[1]}) died while idle"]


def test_a_rank_that_is_stopped_while_idle_is_replaced(pool: warm.WarmPool) -> None:
    pids = run(healthy).values
    os.kill(pids[0], signal.SIGSTOP)
    after = run(healthy, timeout=60)
    assert after.passed
    assert list(pool.recycled) == [f"rank 0 (pid {pids[0]}) stopped while idle"]
    assert not psutil.pid_exists(pids[0])


def test_a_server_that_dies_while_its_ranks_are_idle_is_noticed(pool: warm.WarmPool) -> None:
    pids = run(healthy).values
    psutil.Process(pids[0]).parent().kill()  # type: ignore[union-attr]
    after = run(healthy)
    assert after.passed
    assert not set(after.values) & set(pids)
    assert "idle" in pool.recycled[-1]


def test_an_exception_in_the_waiting_process_ends_the_ranks(
    pool: warm.WarmPool, monkeypatch: pytest.MonkeyPatch
) -> None:
    pids = run(healthy).values

    def interrupted(self: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(warm_watch.WarmSupervision, "watch", interrupted)
        run(stops_moving)
    assert pool.pids() == []
    assert not any(map(psutil.pid_exists, pids))
    assert run(healthy).passed


def test_shutdown_ends_them(pool: warm.WarmPool) -> None:
    pids = run(healthy).values
    warm.shutdown()
    assert pool.pids() == [] and not any(map(psutil.pid_exists, pids))
    assert not client._idle


@pytest.mark.parametrize("way", ["ends", "is killed"])
def test_idle_ranks_end_with_the_session(way: str, tmp_path: Path) -> None:
    last = "" if way == "ends" else "\n    time.sleep(600)"
    session = Session(tmp_path / "s", text=IDLE.format(last=last))
    if way == "is killed":
        session.wait_for_ranks(5)
        session.process.kill()
    output = session.finish()
    if way == "ends":
        assert "1 passed" in output
    assert wait_until(lambda: not marked(session.mark), 60), marked(session.mark)


IDLE = """
import os, time

def program():
    return 1

def test_idle(ddp_launcher):
    ddp_launcher(program, isolation="warm")
    ddp_launcher(program, isolation="warm", world_size=1)
    for rank in range(2):
        open(os.environ["READY"] + str(rank), "w").close(){last}
"""


# -- the pure part --------------------------------------------------------------------------------------


def test_what_only_all_ranks_together_tell() -> None:
    clean = {"collectives": 3, "groups": 1, "balance": 0}
    assert warm_watch.between([clean, clean]) == []
    assert warm_watch.between([clean, {**clean, "collectives": 2}]) == [
        "collectives: not the same number on all ranks (rank 0 3, rank 1 2)"
    ]
    assert warm_watch.between([{**clean, "balance": 1}, {**clean, "balance": -1}]) == []
    assert warm_watch.between([{**clean, "balance": 1}, clean]) == [
        "point-to-point operations: what was sent and what was received differ in number"
    ]


@pytest.mark.slow
def test_a_model_library_is_imported_once_and_is_no_dirt() -> None:
    def program() -> tuple[int, bool]:
        there = "transformers.models.gpt2.modeling_gpt2" in sys.modules
        import torch
        from transformers import GPT2Config, GPT2LMHeadModel

        config = GPT2Config(vocab_size=8, n_positions=8, n_embd=8, n_layer=1, n_head=1)
        GPT2LMHeadModel(config)(torch.zeros(1, 4, dtype=torch.long)).logits.sum().backward()
        return os.getpid(), there

    own_server = {"PYTHONHASHSEED": "7"}
    # accelerate, which transformers imports where it is installed, leaves a filter: new ranks, once.
    brought = launch(program, isolation="warm", env=own_server).recycled
    assert brought is None or "warnings filters" in brought
    first, second = (launch(program, isolation="warm", env=own_server) for _ in range(2))
    assert first.recycled is None and second.values == [(pid, True) for pid, _ in first.values]

    def leaves_a_variable() -> None:
        import transformers.models.llama.modeling_llama  # noqa: F401

        os.environ["LEFT"] = "1"

    assert launch(leaves_a_variable, isolation="warm", env=own_server).recycled
    third = launch(program, isolation="warm", env=own_server)
    assert [there for _, there in third.values] == [True, True], "the server has imported it meanwhile"
