"""Leases between real processes: who holds, who waits, what is left of the dead, folders that are no good."""

from __future__ import annotations

import contextlib
import json
import os
import re
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from pytest_gputrain.devices import leases
from pytest_gputrain.devices.inventory import parse_fake
from pytest_gputrain.devices.lease_folder import LeaseFolder, LeaseFolderError, gpu_name
from pytest_gputrain.devices.lease_place import ASLEEP, Request
from pytest_gputrain.devices.leases import LeaseTimeout, acquire, holders

ROOT = Path(__file__).parent.parent.parent
GPUS = parse_fake("4").gpus

HOLD = """
import os, sys, time
from pathlib import Path
from pytest_gputrain.devices.inventory import parse_fake
from pytest_gputrain.devices.lease_folder import LeaseFolder
from pytest_gputrain.devices.lease_place import Request
from pytest_gputrain.devices.leases import acquire

def hold(num_gpus):
    request = Request(num_gpus, parse_fake("4").gpus, "the other")
    return acquire(LeaseFolder(Path(sys.argv[1])), request, deadline=60)
"""

Start = Callable[[str], "subprocess.Popen[str]"]


@pytest.fixture
def folder(tmp_path: Path) -> LeaseFolder:
    made = LeaseFolder(tmp_path / "not" / "yet" / "there")
    made.prepare()
    return made


@pytest.fixture
def start(folder: LeaseFolder) -> Iterator[Start]:
    """Start a process that prints a line when it is where the program says."""
    started: list[subprocess.Popen[str]] = []

    def run(program: str) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, "-c", HOLD + program, str(folder.path)],
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            text=True,
        )
        started.append(process)
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        return process

    yield run
    for process in started:
        process.kill()
        process.communicate()


def take(folder: LeaseFolder, num_gpus: int, deadline: float = 60.0) -> leases.Lease:
    return acquire(folder, Request(num_gpus, GPUS, "this test"), deadline=deadline)


HOLD_THREE = "lease = hold(3); print('ready', flush=True); time.sleep(300)"


def test_holders_are_named(folder: LeaseFolder, start: Start) -> None:
    assert holders(folder) == []
    before = time.time()
    other = start(HOLD_THREE)
    mine = take(folder, 1)
    found = holders(folder)
    assert [holder.uuid for holder in found] == [gpu.uuid for gpu in GPUS]
    assert [(holder.pid, holder.who) for holder in found].count((other.pid, "the other")) == 3
    assert all(before - 1 <= holder.since <= time.time() + 1 for holder in found)
    mine.release()
    mine.release()
    assert len(holders(folder)) == 3


def test_all_or_nothing_and_who_holds_is_said(folder: LeaseFolder, start: Start) -> None:
    other = start(HOLD_THREE)
    waits: list[float] = []
    with pytest.raises(LeaseTimeout) as caught:
        acquire(folder, Request(2, GPUS, "this test"), deadline=0.5, on_wait=waits.append)
    assert waits
    assert len(caught.value.holders) == 3
    held = f"{GPUS[0].uuid}: the other, pid {other.pid}, for"
    assert re.match(rf"waited \d+ s for 2 GPUs, held by others: {held} \d+ s; ", str(caught.value))
    assert len(holders(folder)) == 3, "the one that was free was not kept"
    assert folder.names("wait") == []


def test_a_killed_holder_holds_nothing(folder: LeaseFolder, start: Start) -> None:
    other = start(HOLD_THREE)
    os.kill(other.pid, signal.SIGKILL)
    lease = take(folder, 4)  # raises after a minute
    assert lease.gpus == GPUS
    lease.release()


@pytest.mark.skipif("not hasattr(os, 'fork')")
def test_what_a_holder_starts_holds_nothing(folder: LeaseFolder, start: Start) -> None:
    program = """
lease = hold(3)
import subprocess
subprocess.Popen(["sleep", "300"], close_fds=False, stdout=subprocess.DEVNULL)
if os.fork() == 0:
    os.close(1)
    time.sleep(300)
    os._exit(0)
print("ready", flush=True)
time.sleep(300)
"""
    other = start(program)
    children = subprocess.run(
        ["pgrep", "-P", str(other.pid)], capture_output=True, text=True, check=True
    ).stdout.split()
    assert len(children) == 2
    try:
        with pytest.raises(LeaseTimeout):
            take(folder, 4, deadline=0.5)  # a forked child that closes its files releases nothing
        os.kill(other.pid, signal.SIGKILL)
        take(folder, 4).release()
    finally:
        for pid in children:
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(pid), signal.SIGKILL)


def test_a_dead_waiter_is_forgotten(folder: LeaseFolder, start: Start) -> None:
    mine = take(folder, 1)
    program = """
import threading
threading.Timer(0.5, lambda: print("ready", flush=True)).start()
hold(4)
"""
    other = start(program)
    while not folder.names("wait"):
        time.sleep(0.01)
    with pytest.raises(LeaseTimeout, match="held by others"):
        take(folder, 1, deadline=0.5)  # three are free, and kept for the one that needs four
    os.kill(other.pid, signal.SIGKILL)
    take(folder, 3).release()
    assert folder.names("wait") == []
    mine.release()


def test_nobody_waits_for_a_stopped_waiter(folder: LeaseFolder, start: Start) -> None:
    mine = take(folder, 1)
    program = """
import threading
threading.Timer(0.5, lambda: print("ready", flush=True)).start()
hold(4)
"""
    other = start(program)
    while not folder.names("wait"):
        time.sleep(0.01)
    with folder.queue():  # so that the other does not hold it, which would be another test
        os.kill(other.pid, signal.SIGSTOP)
    [ticket] = folder.names("wait")
    long_ago = time.time() - ASLEEP - 1
    os.utime(folder.path / f"{ticket}.json", (long_ago, long_ago))
    take(folder, 1).release()
    os.kill(other.pid, signal.SIGCONT)
    mine.release()


def test_a_folder_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "leases").touch()
    with pytest.raises(LeaseFolderError) as caught:
        LeaseFolder(tmp_path / "leases").prepare()
    assert str(caught.value) == (
        f"lease folder '{tmp_path}/leases' is not a folder; give a folder that this user can write, "
        "by --gputrain-lease-dir or GPUTRAIN_LEASE_DIR"
    )


@pytest.mark.skipif("sys.platform != 'linux'")
def test_a_folder_that_cannot_be_made() -> None:
    with pytest.raises(LeaseFolderError, match=r"^lease folder '/proc/leases' cannot be used \(.*\); give a"):
        LeaseFolder(Path("/proc/leases")).prepare()


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    if os.geteuid() == 0:
        pytest.skip("root may write everywhere")
    tmp_path.chmod(0o500)
    with pytest.raises(LeaseFolderError, match=r"cannot be used \(Permission denied\)"):
        LeaseFolder(tmp_path).prepare()


def test_a_full_disk(tmp_path: Path) -> None:
    """No file of this process may grow: writing fails as on a full disk, by another number."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, hard))
    try:
        with pytest.raises(
            LeaseFolderError, match=r"^lease folder .* cannot be used \(File too large\); give"
        ):
            LeaseFolder(tmp_path).prepare()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_disk_that_is_full_later_takes_no_lease_away(folder: LeaseFolder) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, hard))
    try:
        lease = take(folder, 4)
        assert [holder.who for holder in holders(folder)] == ["held, its record cannot be read"] * 4
        lease.release()
        assert holders(folder) == []
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize(
    "garbage", [b"", b"\xff\x00garbage", b"[1, 2]", b'{"number": "x"}', b"[" * 100_000, b'{"number": 1}']
)
def test_garbage_is_passed_over(folder: LeaseFolder, garbage: bytes) -> None:
    for name in ("probe", gpu_name(GPUS[0].uuid), "wait-1", "gpu-elsewhere"):
        (folder.path / f"{name}.json").write_bytes(garbage)
        (folder.path / f"{name}.lock").write_bytes(garbage)
    for name in ("bell", "queue.lock", "wait-", "notes.txt"):
        (folder.path / name).write_bytes(garbage)
    living = folder.try_lock("wait-1.lock")  # somebody's, who wrote nonsense
    assert living is not None
    folder.prepare()
    lease = take(folder, 4)
    assert len(holders(folder)) == 4
    lease.release()
    living.release()


@pytest.mark.parametrize("number", ["1e999", "-1e999", "NaN", "9" * 400, "-" + "9" * 400, "0", "true"])
def test_numbers_that_mean_nothing_are_passed_over(folder: LeaseFolder, number: str) -> None:
    mine = take(folder, 3)
    names = ("pid", "since", "num_gpus", "seconds", "number")
    record = (
        f'{{"who": "x", "candidates": [], {", ".join(f"{json.dumps(name)}: {number}" for name in names)}}}'
    )
    for gpu in mine.gpus:
        (folder.path / f"gpu-{gpu.uuid}.json").write_text(record)
    waiting = folder.try_lock("wait-1.lock")
    assert waiting is not None
    (folder.path / "wait-1.json").write_text(record)
    take(folder, 1).release()
    with pytest.raises(LeaseTimeout) as caught:
        take(folder, 2, deadline=0.2)
    assert len(caught.value.holders) == 3
    assert str(caught.value).startswith("waited ")
    waiting.release()
    mine.release()
