"""Processes that a rank has started: how they are seen, and when what they hold grows without end."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pytest_gputrain.endurance.children import DATA_WORKER, EVERY, FORKED, Children
from pytest_gputrain.endurance.offspring import offspring
from pytest_gputrain.endurance.records import StepRecord, record_of

KB, MB = 1024, 1024**2
STEPS = 240
LOOKS = 4  # steps between two looks

# A process that says it is there, with a child of its own.
PARENT = "\n".join(
    [
        "import subprocess",
        "child = subprocess.Popen(['sleep', '60'])",
        "print('up', flush=True)",
        "input()",
        "child.kill()",
        "child.wait()",
    ]
)


@pytest.mark.skipif("sys.platform != 'linux'", reason="/proc is Linux's")
def test_children_and_theirs_are_seen_until_they_have_ended() -> None:
    children = Children(STEPS)
    assert children.look(1) == {}
    with subprocess.Popen(
        [sys.executable, "-c", PARENT], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"up\n"
        seen = children.look(EVERY)
        by_pid = {one["pid"]: one for one in seen["children"]}
        assert process.pid in by_pid
        assert by_pid[process.pid]["name"].startswith(f"{sys.executable} -c import subprocess")
        assert by_pid[process.pid]["bytes"] > MB
        assert by_pid[process.pid]["fds"] >= 3
        assert "sleep 60" in [one["name"] for one in seen["children"]]
        assert seen["num_children"] == len(by_pid)
        assert children.look(EVERY + 1) == {}
        assert children.look(EVERY + LOOKS)["num_children"] == len(by_pid)
        process.communicate(b"\n")
    later = children.look(2 * EVERY)
    assert process.pid not in [one["pid"] for one in later["children"]]


def test_what_a_busy_machine_keeps_from_workers_is_known(tmp_path: Path) -> None:
    """In seconds of the kernel's clock, from one look to the next."""
    own = os.getpid()

    def told(pid: int, queued: float) -> None:
        folder = tmp_path / str(pid)
        folder.mkdir(exist_ok=True)
        (folder / "stat").write_text(f"{pid} (python) S {own if pid > own else 1} 0 0")
        (folder / "schedstat").write_text(f"7000000000 {queued * 1e9:.0f} 7\n")
        (folder / "statm").write_text("500 300 100 1 0 9 0")

    children = Children(STEPS, tmp_path)
    told(own, 9.0)
    told(own + 1, 0.5)
    assert children.look(EVERY)["children_queued"] == 0
    told(own + 1, 6.5)
    told(own + 2, 2.0)  # its first look
    assert children.look(2 * EVERY)["children_queued"] == pytest.approx(6.0)
    told(own + 2, 3.0)
    assert children.look(2 * EVERY + LOOKS)["children_queued"] == pytest.approx(1.0)


def test_a_data_loaders_worker_and_a_forked_one_are_named(tmp_path: Path) -> None:
    """Read from a folder as the kernel writes it."""
    own = os.getpid()
    for pid, parent, comm, command in (
        (own, 1, "python", "python\0train.py\0"),
        (own + 1, own, "pt_data_worker", "python\0train.py\0"),
        (own + 2, own + 1, "a (b) c", "python\0train.py\0"),
        (own + 3, 1, "other", "other\0"),
    ):
        folder = tmp_path / str(pid)
        (folder / "fd").mkdir(parents=True)
        (folder / "stat").write_text(f"{pid} ({comm}) S {parent} 0 0")
        (folder / "comm").write_text(comm + "\n")
        (folder / "cmdline").write_text(command)
        (folder / "statm").write_text("500 300 100 1 0 9 0")
    seen = Children(STEPS, tmp_path).look(EVERY)
    page = os.sysconf("SC_PAGE_SIZE")
    assert seen["num_children"] == 2
    assert seen["children"] == [
        {"pid": own + 1, "name": DATA_WORKER, "bytes": 200 * page, "fds": 0},
        {"pid": own + 2, "name": FORKED, "bytes": 200 * page, "fds": 0},
    ]


def test_where_there_is_no_proc_nothing_is_told(tmp_path: Path) -> None:
    assert Children(STEPS, tmp_path / "none").look(EVERY) == {"num_children": 0, "children": []}


Shape = Callable[[int], float]


def records(*, number: Shape = lambda step: 1, **of_worker: Shape) -> list[StepRecord]:
    """A worker looked at every few steps; ``bytes`` and ``fds`` above where it begins, ``pid`` by step."""

    def worker(step: int) -> dict[str, Any]:
        more = {name: round(shape(step)) for name, shape in of_worker.items()}
        kept = {"bytes": 80 * MB + more.get("bytes", 0), "fds": 9 + more.get("fds", 0)}
        return {"pid": 7 + more.get("pid", 0), "name": DATA_WORKER, **kept}

    found = []
    for step in range(1, STEPS + 1):
        seen = {} if step % LOOKS else {"num_children": round(number(step)), "children": [worker(step)]}
        found.append(StepRecord(step=step, loss=1.0, seconds=0.1, **seen))  # type: ignore[arg-type]
    return found


def test_memory_of_a_worker_that_grows() -> None:
    leaks = records(bytes=lambda step: 96 * KB * step)
    (found,) = offspring({0: records(), 1: leaks}, {7: "data loader worker 1 of 2"})
    assert (found.kind, found.rank) == ("child_memory", 1)
    assert found.message == (
        "memory of data loader worker 1 of 2 (process 7 of rank 1) grows without end, by 96.0 KiB a step "
        "from step 28 to 240; look at what it keeps of each sample\n"
        "  17.6 MiB in all; with 95 % confidence between 96.0 KiB and 96.0 KiB a step"
    )
    (both,) = offspring({0: leaks, 1: leaks}, {})
    assert "a data loader's worker (process 7 of rank 0), and 1 more, grows" in both.message


def test_open_files_of_a_worker_and_the_number_of_processes() -> None:
    (found,) = offspring({0: records(fds=lambda step: step / 2)}, {})
    assert found.message == (
        "open files of a data loader's worker (process 7 of rank 0) grow, by 0.5 a step from step 28 to 240: "
        "94 in all; close what each sample opens"
    )
    (found,) = offspring({0: records(number=lambda step: step)}, {})
    assert found.message == (
        "processes that rank 0 has started grow, by 1 a step from step 28 to 240: 188 in all, most of them "
        "a data loader's worker; wait for what each step starts, or end it"
    )


HEALTHY: dict[str, dict[str, Shape]] = {
    "a cache that fills and stops": {"bytes": lambda step: 256 * KB * min(step, 200)},
    "started anew in every epoch": {
        "bytes": lambda step: MB * (step % 60),
        "fds": lambda step: step % 60,
        "pid": lambda step: step // 60,
    },
    "comes and goes": {"bytes": lambda step: 30 * MB * (step % 40 > 20)},
    "settles slowly": {"bytes": lambda step: 8 * KB * step},
    "a pool that is started once": {"number": lambda step: 8 * (step > 60)},
    "as many as there are": {},
}


@pytest.mark.parametrize("name", HEALTHY)
def test_processes_that_are_well(name: str) -> None:
    assert offspring({0: records(**HEALTHY[name])}, {}) == []


def test_a_process_that_has_ended_and_runs_without_looks_say_nothing() -> None:
    leaks = records(bytes=lambda step: 96 * KB * step, pid=lambda step: step // 239)
    assert offspring({0: leaks}, {}) == []
    assert offspring({0: [StepRecord(step=1, loss=1.0, seconds=0.1)], 1: []}, {}) == []


def test_what_was_seen_comes_back_from_the_record() -> None:
    record = records(bytes=lambda step: step)[LOOKS - 1]
    assert record.children
    assert record_of(record.line()) == record
