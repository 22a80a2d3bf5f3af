"""Tests marked ``distributed`` that fail: the cause first, then what pytest shows in one process."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from .conftest import Run

pytestmark = pytest.mark.skipif("sys.platform != 'linux'", reason="launching ranks needs Linux")

FAILING = """
import os, sys, threading
import pytest
import torch.distributed as dist
from pytest_gputrain import distributed

def check(values):
    return compare(values)

def compare(values):
    assert values == [1, 2, 4]

@distributed
def test_a_diff(rank):
    values = [1, 2, 3 if rank == 1 else 4]
    print("before it", rank)
    check(values)

@distributed
def test_other_values(rank):
    assert rank == 5

@distributed
def test_other_places(rank):
    if rank == 1:
        try:
            raise KeyError("first")
        except KeyError as error:
            raise ValueError("then") from error
    raise TypeError("elsewhere")

@pytest.mark.xfail(raises=TypeError, strict=True)
@distributed
def test_one_type_is_not_both(rank):
    raise TypeError("a") if rank else ValueError("b")

@distributed
def test_mixed_xfail(rank):
    if rank: pytest.xfail("because")

@distributed
def test_mixed_skip(rank):
    if rank: pytest.skip("because")

@distributed
def test_hangs(rank):
    if rank == 0:
        dist.barrier()

@distributed
def test_crashes(rank):
    if rank == 1:
        os._exit(0)
    dist.barrier()

@distributed
def test_interrupted(): raise KeyboardInterrupt

@pytest.fixture
def lock(): return threading.Lock()

@distributed
def test_lock(lock): pass

@distributed
def test_request(request): pass

@pytest.fixture
def uses_rank(rank): return rank + 1

@distributed
def test_uses_rank(uses_rank): pass

def test_not_marked(rank): pass
"""

SHOWN = [
    [
        "FAILED after * s: rank 1 raised AssertionError: assert [[]1, 2, 3[]] == [[]1, 2, 4[]]   at "
        "test_it.py:* in compare",
        "  rank 0: *",  # it may not have come to its end when rank 1 fails
        "",
        "rank = 1",
        ">       check(values)",
        "test_it.py:*: in check",
        "    return compare(values)",
        ">       assert values == [[]1, 2, 4[]]",
        "E       assert [[]1, 2, 3[]] == [[]1, 2, 4[]]",
        "E         At index 2 diff: 3 != 4",
        "test_it.py:*: AssertionError",
        "*Captured stdout of rank 0 call*",
        "before it 0",
        "*Captured stdout of rank 1 call*",
    ],
    [
        "FAILED after * s: rank ? raised AssertionError: assert ? == 5   at *in test_other_values",
        "  rank ?: raised AssertionError: assert ? == 5   at *in test_other_values",
        "E       assert ? == 5",
    ],
    ["--- rank 0", ">       raise TypeError(*", "E       TypeError: elsewhere"],
    [
        "--- rank 1",
        "E *KeyError: 'first'",
        "The above exception was*",
        "E *ValueError: then",
    ],
    ["FAILED after * s: rank 1 called pytest.xfail('because') while rank 0 passed: xfail on all ranks or *"],
    ["FAILED after * s: rank 1 skipped (because) while rank 0 ran: skip on all ranks or on none *"],
    ["HUNG after * s: rank 1 never reached barrier #1; it finished; rank 0 waits in it *"],
    ["CRASHED after * s: rank 1 left with exit code 0 before it was done (os._exit[?])*"],
    ["FAILED after * s: ranks 0-1 raised KeyboardInterrupt   at test_it.py:* in test_interrupted"],
    [
        "*_ test_lock _*",
        "the value of the fixture 'lock' cannot be sent to the ranks: TypeError: cannot pickle "
        "'_thread.lock' object; make it in the test, or let the fixture return a function that makes it",
    ],
    [
        "*_ test_request _*",
        "the fixture 'request' belongs to the pytest process and is of no use on ranks; take what the test "
        "needs of it in a fixture, and return that",
    ],
    [
        ">   def uses_rank(rank): return rank + 1",
        "E*UsageError: rank is known on the ranks only, and fixtures run once, before these start: keep it "
        "in what the fixture returns, or use it in the test",
    ],
    [
        "*_ ERROR at setup of test_not_marked _*",
        "the fixture 'rank' means something on a rank only: mark the test "
        "@pytest.mark.distributed(world_size=2), or take ddp_launcher",
    ],
    ["FAILED test_it.py::test_a_diff - rank 1: assert [[]1, 2, 3[]] == [[]1, 2, 4[]]"],
    ["FAILED test_it.py::test_hangs - HUNG after * s: rank 1 never reached barrier*"],
]


def test_what_a_failure_shows(
    pytester: pytest.Pytester, run_with_torch: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    pytester.makepyfile(test_it=FAILING)
    result = run_with_torch()
    result.assert_outcomes(failed=11, errors=2)
    for lines in SHOWN:
        result.stdout.fnmatch_lines(lines)
    machinery = [
        line for line in result.outlines if "pytest_gputrain/" in line and "site-packages" not in line
    ]
    assert machinery == []


@pytest.mark.slow
def test_traceback_styles(
    pytester: pytest.Pytester, run_with_torch: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    pytester.makepyfile(test_it=FAILING)
    one = ("-k", "a_diff", "--show-capture=no")
    short = run_with_torch(*one, "--tb=short", "-l").stdout
    short.fnmatch_lines(["test_it.py:*: in test_a_diff", "    check(values)", "* values  *= [[]1, 2, 3[]]"])
    short.no_fnmatch_line("*before it*")
    assert "Traceback (most recent call last):" in run_with_torch(*one, "--tb=native").outlines
    run_with_torch(*one, "--tb=line").stdout.fnmatch_lines(
        ["*test_it.py:*: rank 1: assert [[]1, 2, 3[]] == *"]
    )


HANGING = """
import os, time
from pathlib import Path
import pytest

@pytest.mark.distributed(world_size=1)
def test_starts_the_server(): pass

@pytest.mark.distributed
@pytest.mark.timeout(15)
def test_hangs(rank, tmp_path_factory):
    (tmp_path_factory.getbasetemp().parent / f"pid{rank}").write_text(str(os.getpid()))
    time.sleep(600)

def test_goes_on(): pass
"""


@pytest.mark.slow
@pytest.mark.parametrize("method", ["signal", "thread"])
def test_pytest_timeout_ends_the_ranks(pytester: pytest.Pytester, run_child: Run, method: str) -> None:
    pytester.makepyfile(HANGING)
    pytester.mkdir("tmp")
    result = run_child(f"--timeout-method={method}", f"--basetemp={pytester.path}/tmp/base")
    if method == "signal":
        result.assert_outcomes(passed=2, failed=1)
    else:
        assert result.ret == 1  # the whole process ends, as always with this method
    pids = [int(path.read_text()) for path in Path(pytester.path, "tmp").glob("pid*")]
    assert len(pids) == 2
    _, alive = psutil.wait_procs([psutil.Process(pid) for pid in pids if psutil.pid_exists(pid)], timeout=60)
    assert alive == []


DEBUGGED = """
import pytest, torch.distributed as dist

@pytest.mark.distributed
def test_it(rank, world_size, device):
    dist.barrier()
    print("world of", world_size)
    assert (rank, str(device)) == (1, "cpu")
"""


def test_pdb_says_how_to_debug_one_rank(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(test_it=DEBUGGED)
    there = debugged(pytester, "--pdb")
    there.stdout.fnmatch_lines(
        [
            "  --pdb cannot enter ranks, which are processes of their own; this runs the body as one rank in "
            "pytest's process: pytest --pdb --gputrain-alone 'test_it.py::test_it'",
            '>       assert (rank, str(device)) == (1, "cpu")',
        ]
    )
    here = debugged(pytester, "--pdb", "--gputrain-alone", "test_it.py::test_it")
    here.stdout.fnmatch_lines(["gputrain: *alone True (from the command line)", "(Pdb) ('here', 0, 1)"])
    assert here.ret == 2
    assert "RANK" not in os.environ


def debugged(pytester: pytest.Pytester, *arguments: str) -> pytest.RunResult:
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "pytest_gputrain", *arguments],
        cwd=pytester.path,
        input="p 'here', rank, world_size\nq\n",
        capture_output=True,
        text=True,
        timeout=200,
    )
    print(done.stdout, done.stderr)
    return pytest.RunResult(done.returncode, done.stdout.splitlines(), done.stderr.splitlines(), 0)


def test_without_the_assertion_plugin(pytester: pytest.Pytester, run_with_torch: Run) -> None:
    pytester.makepyfile(
        """
        import pytest

        @pytest.mark.distributed
        def test_it(rank): assert rank == 0, "said by hand"
        """
    )
    result = run_with_torch("-p", "no:assertion")
    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(["FAILED after * s: rank 1 raised AssertionError: said by hand*"])
