"""Every planted hang, crash and desync is named: verdict, culprit, operation, lines. No healthy one is."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from pytest_gputrain import launch
from pytest_gputrain.launch import LaunchDefaults, Launcher, Verdict
from tests.planted.hangs import EITHER, Hang
from tests.planted.hangs_absent import ABSENT
from tests.planted.hangs_desync import DESYNC
from tests.planted.healthy_waits import WAITS


def params(hangs: Iterable[Hang]) -> list[object]:
    slow = pytest.mark.slow
    return [pytest.param(hang, id=hang.name, marks=[slow] if hang.slow else []) for hang in hangs]


@pytest.mark.parametrize("hang", params([*ABSENT, *DESYNC]))
def test_a_planted_hang_is_named(hang: Hang) -> None:
    result = launch(
        hang.program, world_size=hang.world_size, timeout=hang.timeout, stall=hang.stall, check=False
    )
    text = result.summary()
    assert result.verdict.name == hang.verdict, text
    assert result.cause is not None, text
    assert result.cause.rank == hang.blames or hang.blames == EITHER, text
    for words in hang.says:
        assert words in text, text
    if culprit := hang.marked("culprit"):
        assert any(line in str(result.cause) for line in culprit), text
    for line in hang.marked("victim"):
        assert line in text, text
    if hang.verdict == "HUNG":
        assert result.seconds < hang.timeout / 2, text


FAST_WAITS = ("long_validation", "idle_rank_0", "uneven_inputs", "a_subgroup", "pipeline", "asynchronous")


@pytest.mark.parametrize(
    "program",
    [
        pytest.param(
            program,
            id=program.__name__,
            marks=[] if program.__name__.startswith(FAST_WAITS) else [pytest.mark.slow],
        )
        for program in WAITS
    ],
)
def test_a_healthy_wait_is_left_alone(program: Callable[[], Any]) -> None:
    size = 3 if "subgroup" in program.__name__ or "three" in program.__name__ else 2
    result = launch(program, world_size=size, timeout=100, stall=60, check=False)
    assert result.verdict is Verdict.PASSED, result.summary()
    assert list(result.artifacts.rglob("calls.ring")) == []


def test_there_are_enough_of_each() -> None:
    assert len([*ABSENT, *DESYNC]) >= 25
    assert len(WAITS) >= 8


def lag() -> int:
    for _ in range(3 - dist.get_rank()):
        dist.all_reduce(torch.ones(5))
    return 1


def test_the_records_are_left_in_the_documented_form(tmp_path: Path) -> None:
    result = Launcher(defaults=LaunchDefaults(artifacts=tmp_path))(lag, timeout=40, check=False)
    records = [
        json.loads((result.artifacts / f"rank{rank}" / "collectives.json").read_text()) for rank in range(2)
    ]
    assert [[record["state"] for record in mine] for mine in records] == [
        ["done", "done", "waiting"],
        ["done", "done"],
    ]
    last = records[0][-1]
    assert abs(last.pop("at") - time.time()) < 300
    assert last.pop("location").endswith(" in lag")
    assert last == {
        "seq": 3, "op": "all_reduce", "sizes": [[5]], "dtypes": ["float32"], "group": "0", "ranks": [0, 1],
        "state": "waiting", "note": None,
    }  # fmt: skip
    assert list(result.artifacts.rglob("calls.ring")) == []


def test_without_torchs_recorder_the_own_records_tell() -> None:
    result = launch(lag, timeout=40, env={"TORCH_FR_BUFFER_SIZE": "0"}, check=False)
    assert "rank 1 never reached all_reduce #3 (5 x float32); it returned" in str(result.cause)


def test_a_slow_launch_is_timed_out_and_says_where_the_time_goes() -> None:
    def program() -> None:
        while True:
            time.sleep(0.001)
            sum(range(30_000))

    result = launch(program, timeout=6, check=False)  # of 3 s a busy machine leaves no samples
    assert result.verdict is Verdict.TIMED_OUT
    assert "likely: slow, not hung: rank 0 in " in result.summary()


def test_the_user_sees_no_thread_and_no_variable() -> None:
    def program() -> list[object]:
        import threading

        return [
            len(threading.enumerate()),
            [name for name in os.environ if "TRACE_BUFFER" in name or "_FR_" in name],
        ]

    assert launch(program).values == [[1, []], [1, []]]


DDP_LOOP = """
import torch, torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel as DDP
dist.init_process_group("gloo")
def train():
    net = DDP(torch.nn.Linear(4, 4))
    for step in range(4 - dist.get_rank()):
        net(torch.ones(2, 4)).sum().backward()
train()
"""
WITH_MAIN = """
import argparse, datetime, os, torch, torch.distributed as dist
def main():
    options = argparse.ArgumentParser()
    options.add_argument("--steps", type=int, default=1)
    steps = options.parse_args().steps
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    os.environ["MY_LAUNCHER_RANK"] = str(rank)
    dist.init_process_group("gloo", rank=rank, world_size=size, timeout=datetime.timedelta(minutes=20))
    for step in range(steps):
        dist.all_reduce(torch.ones(8))
    if rank == 0:
        dist.barrier()
if __name__ == "__main__":
    main()
"""
MODULE = """
import torch, torch.distributed as dist
dist.init_process_group("gloo")
if dist.get_rank() == 0:
    dist.all_reduce(torch.ones(2)); dist.broadcast(torch.ones(3), 0)
else:
    dist.all_reduce(torch.ones(2)); dist.all_reduce(torch.ones(3))
dist.barrier()
"""


@pytest.mark.parametrize(
    ("text", "argv", "words"),
    [
        pytest.param(DDP_LOOP, [], "rank 1 never reached all_reduce #", id="ddp_loop"),
        pytest.param(WITH_MAIN, ["--steps", "2"], "rank 1 never reached barrier #3", id="main_and_argparse"),
        pytest.param(
            MODULE, [], "rank 1 called all_reduce #2 (3 x float32) where rank 0 called", id="module"
        ),
    ],
)
def test_an_unmodified_script_is_diagnosed(
    text: str, argv: list[str], words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pack").mkdir()
    (tmp_path / "pack" / "__init__.py").touch()
    (tmp_path / "pack" / "train.py").write_text(text)
    module = text is MODULE
    target = "pack.train" if module else "pack/train.py"
    result = launch.torchrun(target, *argv, module=module, timeout=60, check=False)
    assert result.verdict is Verdict.HUNG, result.summary()
    assert words in str(result.cause), result.summary()
    assert "pack/train.py:" in str(result.cause)
