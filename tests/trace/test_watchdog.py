"""Heartbeats, and the stacks that a rank writes when it stands still or is asked."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from pytest_gputrain.launch import LaunchDefaults, Launcher, LaunchResult, Verdict
from pytest_gputrain.trace import heartbeat, stackdumps
from pytest_gputrain.trace.heartbeat import Beat, Heartbeat, Scalar
from pytest_gputrain.trace.install import install
from pytest_gputrain.trace.lines import PENDING_STACKS
from pytest_gputrain.trace.sink import Progress, Sink
from pytest_gputrain.trace.switches import Switches
from pytest_gputrain.trace.vitals import num_targets
from pytest_gputrain.trace.watchdog import Watchdog

SOON = 60.0  # seconds that a busy machine gets; what is waited for comes in a fraction of one
KEYS = [
    "ts", "iso", "pid", "rank", "step", "msg",
    "gpu_mem_alloc", "gpu_mem_reserved", "loss", "toks_per_s", "grad_norm",
]  # fmt: skip


def until(found: Callable[[], Any]) -> Any:
    limit = time.monotonic() + SOON
    while not (value := found()):
        assert time.monotonic() < limit
        time.sleep(0.02)
    return value


def beats(folder: Path, rank: int = 0) -> list[dict[str, Any]]:
    path = folder / f"heartbeat_rank{rank}.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def dumps(folder: Path) -> list[str]:
    return [path.read_text() for path in sorted(folder.glob("watchdog_stackdump_rank0_*.txt"))]


def test_a_heartbeat_says_what_the_step_computed(tmp_path: Path) -> None:
    session = install(Switches(tracers=("heartbeat",)).as_record(), tmp_path, 3, watchdog_seconds=100.0)
    try:
        model = nn.Linear(4, 5)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        target = torch.tensor([0, 1, 2])
        for _ in range(2):
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(torch.ones(3, 4)), target) / 2
            scaler.scale(loss).backward()
            scaler.unscale_(optimizer)
            norm = nn.utils.clip_grad_norm_(model.parameters(), 10.0)
            scaler.step(optimizer)
            scaler.update()
    finally:
        session.remove()
    first, *lines, last = beats(tmp_path, 3)
    assert all(list(line) == KEYS for line in lines)
    assert [line["step"] for line in lines] == [1, 2]
    assert (first["msg"], lines[0]["msg"], last["msg"]) == ("start", "step", "end")
    for line in lines:
        assert (line["pid"], line["rank"], line["gpu_mem_alloc"]) == (os.getpid(), 3, None)
        assert line["loss"] == pytest.approx(loss.item())
        assert line["grad_norm"] == pytest.approx(norm.item())
        assert line["toks_per_s"] > 0
        assert line["iso"].endswith("+00:00")
        assert abs(line["ts"] - time.time()) < 3600
    assert first["loss"] is first["toks_per_s"] is first["grad_norm"] is None


def test_targets_are_counted_at_the_loss_alone() -> None:
    logits = torch.randn(6, 5, requires_grad=True)
    loss = nn.functional.cross_entropy(logits, torch.zeros(6, dtype=torch.long))
    assert num_targets(loss / 4 + 0.1 * logits.sum()) == 6
    image = torch.randn(2, 5, 3, 3, requires_grad=True)
    assert num_targets(nn.functional.cross_entropy(image, torch.zeros(2, 3, 3, dtype=torch.long))) == 18
    assert num_targets(logits.square().mean()) == 0
    assert num_targets(None) == num_targets(torch.ones(())) == 0


def test_numbers_that_are_none() -> None:
    assert [Scalar.of(value).value for value in (None, torch.ones(2), torch.tensor(float("nan")))] == [
        None
    ] * 3
    assert Scalar.of(torch.tensor([2.5])).value == 2.5


def test_heartbeats_come_once_a_second_and_rarer_in_long_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 0.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    monkeypatch.setattr(heartbeat, "LINES_AT_A_RATE", 100)
    beating = Heartbeat(tmp_path, 0)
    for step in range(1, 20_001):
        now = step / 10
        if beating.due(step):
            beating.beat(Beat(step, "step"))
    beating.close()
    steps = [line["step"] for line in beats(tmp_path)]
    assert steps[:12] == [*range(1, 11), 20, 30]
    assert 100 * 3 < len(steps) < 100 * 6  # 2,000 s: every second, every 2, every 4, every 8
    assert steps[-1] - steps[-2] >= 40


def test_a_number_still_on_its_way_holds_its_line_back_and_nothing_else(tmp_path: Path) -> None:
    class Event:
        done = False

        def query(self) -> bool:
            return self.done

    event = Event()
    beating = Heartbeat(tmp_path, 0)
    beating.beat(Beat(1, "step", Scalar(torch.tensor(1.5), event)))
    beating.poll()
    assert beats(tmp_path) == []
    event.done = True
    beating.poll()
    beating.beat(Beat(2, "step", Scalar(torch.tensor(2.5), Event())))
    beating.beat(Beat(3, "step"))
    beating.close()
    assert [(line["step"], line["loss"]) for line in beats(tmp_path)] == [(1, 1.5), (2, None), (3, None)]


def test_a_log_of_lines_ends_at_its_bound(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pytest_gputrain.trace.sink.MOST_BYTES", 1 << 20)
    sink = Sink(tmp_path, ())
    for _ in range(3000):
        sink.write("grads", ["x" * 1000])
    sink.close()
    text = (tmp_path / "traces.log").read_text()
    assert len(text) < (1 << 20) + 2000
    assert text.endswith("[TRACE] 1 MiB are written; what comes after is not\n")


def test_standing_still_is_dumped_once_and_again_after_it_moved(tmp_path: Path) -> None:
    progress = Progress()
    told: list[str] = []
    watchdog = Watchdog(tmp_path, 0, 0.2, progress, lambda: "step 7\n", told.append)
    with watchdog.running():
        until(lambda: len(dumps(tmp_path)) == 1)
        time.sleep(1.0)
        assert len(dumps(tmp_path)) == 1
        progress.beat()
        until(lambda: len(dumps(tmp_path)) == 2)
    first = dumps(tmp_path)[0]
    assert "nothing moved for" in first.splitlines()[0]
    assert "step 7" in first
    assert "test_standing_still_is_dumped_once_and_again_after_it_moved" in first
    assert sorted(told) == sorted(path.name for path in tmp_path.iterdir())


def test_what_moves_is_left_alone(tmp_path: Path) -> None:
    progress = Progress()
    with Watchdog(tmp_path, 0, SOON, progress, str).running():
        time.sleep(0.3)
    assert list(tmp_path.iterdir()) == []


def test_a_signal_asks_for_stacks(tmp_path: Path) -> None:
    with Watchdog(tmp_path, 0, SOON, Progress(), lambda: "[GRAD-TRACE] so far\n").running():
        os.kill(os.getpid(), signal.SIGUSR1)
        text = until(lambda: dumps(tmp_path))[0]
    assert "on demand (SIGUSR1)" in text
    assert "[GRAD-TRACE] so far" in text
    assert "Current thread" in text  # faulthandler's own words


def test_a_signal_that_the_script_has_taken_is_its_own(tmp_path: Path) -> None:
    got: list[int] = []
    with Watchdog(tmp_path, 0, SOON, Progress(), str).running():
        assert signal.getsignal(signal.SIGUSR1) is signal.SIG_DFL  # as Lightning asks before it takes it
        before = signal.signal(signal.SIGUSR1, lambda number, _: got.append(number))
        try:
            os.kill(os.getpid(), signal.SIGUSR1)
            until(lambda: got)
            time.sleep(1.5)  # it looks once a second
        finally:
            signal.signal(signal.SIGUSR1, before)
    assert dumps(tmp_path) == []


def test_a_scripts_own_timer_is_left_alone(tmp_path: Path) -> None:
    import faulthandler

    with open(tmp_path / "own.txt", "w+") as own, Watchdog(tmp_path, 0, 4.0, Progress(), str).running():
        faulthandler.dump_traceback_later(1.5, file=own)
        until(lambda: (tmp_path / "own.txt").stat().st_size)
    assert faulthandler.dump_traceback_later.__module__ == "faulthandler"


def test_what_nobody_came_to_read_becomes_a_dump(tmp_path: Path) -> None:
    (tmp_path / PENDING_STACKS).write_text("")
    stackdumps.settle(tmp_path, 0)
    assert list(tmp_path.iterdir()) == []
    (tmp_path / PENDING_STACKS).write_text("Thread 1:\n")
    stackdumps.settle(tmp_path, 0)
    assert dumps(tmp_path) == ["Thread 1:\n"]
    stackdumps.settle(tmp_path / "gone", 0)


@pytest.mark.skipif(
    shutil.which("py-spy", path=os.path.dirname(sys.executable)) is None, reason="needs the extra [stacks]"
)
def test_native_stacks_where_py_spy_is_installed() -> None:
    text = stackdumps.native_stacks()
    if text.startswith("py-spy failed"):
        pytest.skip(text)  # this machine lets no process look at another
    assert "test_native_stacks_where_py_spy_is_installed" in text


def run(folder: Path, body: str, **options: Any) -> LaunchResult:
    script = folder / "stuck.py"
    script.write_text(body)
    launcher = Launcher(defaults=LaunchDefaults(artifacts=folder / "out"))
    env = {"GPUTRAIN_WATCHDOG_SECONDS": "1"}
    return launcher.torchrun(script, nproc=1, check=False, env=env, **options)


def test_a_script_that_ignores_sigterm_cannot_fool_it(tmp_path: Path) -> None:
    # os.write: torchrun sends SIGTERM twice, and a print within a print is an error, which would end it.
    body = """
import os, signal, threading, torch
signal.signal(signal.SIGTERM, lambda *_: os.write(1, b"not me\\n"))
model = torch.nn.Linear(2, 1)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
model(torch.ones(1, 2)).sum().backward()
optimizer.step()
model.weight.register_hook(lambda grad: threading.Event().wait())
model(torch.ones(1, 2)).sum().backward()
"""
    result = run(tmp_path, body, timeout=200, stall=8)
    assert result.verdict is Verdict.HUNG, result.summary()
    folder = result.artifacts / "rank0"
    text = dumps(folder)[-1]  # on a busy machine the start may count as standing still
    assert "nothing moved for" in text
    assert "stuck.py" in text
    assert "[GRAD-TRACE] after_backward_step2 arrived=1 missing=1 model=Linear\n  - MISSING: weight" in text
    assert "  - ARRIVED: bias" in text
    assert beats(folder)[-1]["msg"].startswith("nothing moved, stacks in watchdog_stackdump_rank0_")
    assert not (folder / PENDING_STACKS).exists()


@pytest.mark.slow
def test_a_rank_that_holds_the_interpreter_says_where_it_is(tmp_path: Path) -> None:
    # Locked twice by the same thread: for ever, whatever signals come, with the interpreter's lock in hand.
    body = """
import ctypes
def hold():
    libc, mutex = ctypes.PyDLL(None), ctypes.create_string_buffer(128)
    libc.pthread_mutex_lock(mutex)
    libc.pthread_mutex_lock(mutex)
hold()
"""
    result = run(tmp_path, body, timeout=200, stall=12)
    assert result.verdict is Verdict.HUNG, result.summary()
    assert any("stuck.py" in text and "in hold" in text for text in dumps(result.artifacts / "rank0"))
