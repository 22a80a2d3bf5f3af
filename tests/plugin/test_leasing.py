"""Leases as a test of a user sees them: what it holds, what its ranks see, how it waits and how it fails."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from pytest_gputrain.devices.inventory import parse_fake
from pytest_gputrain.devices.lease_folder import LeaseFolder
from pytest_gputrain.devices.lease_place import Request
from pytest_gputrain.devices.leases import Lease, acquire, holders
from pytest_gputrain.launch import warm

from .conftest import Run

UUID = "GPU-fa4e0000-0000-0000-0000-00000000000"
TWO_GPUS = """
import pytest

@pytest.mark.requires_gpus(2)
def test_two(gpus): assert len(gpus) == 2
"""


@pytest.fixture(autouse=True)
def _four_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GPUTRAIN_FAKE_GPUS", "4")


@pytest.fixture
def folder() -> LeaseFolder:
    made = LeaseFolder(Path(os.environ["GPUTRAIN_LEASE_DIR"]))
    made.prepare()
    return made


@pytest.fixture
def all_held(folder: LeaseFolder) -> Iterator[Lease]:
    """All GPUs held by the test that runs pytest."""
    lease = acquire(folder, Request(4, parse_fake("4").gpus, "another run"), deadline=60)
    yield lease
    lease.release()


def test_what_a_test_holds(pytester: pytest.Pytester, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,1,0")
    pytester.makepyfile(
        f"""
        import os
        import pytest
        from pytest_gputrain.devices.leases import holders
        from pytest_gputrain.plugin.leasing import folder_of

        @pytest.mark.requires_gpus(2)
        def test_two(gpus, gpu_count, ddp_launcher, request):
            assert gpu_count == 2
            assert [gpu.index for gpu in gpus] == [3, 1]
            assert gpus.devices == ["cuda:0", "cuda:1"]
            assert ddp_launcher.defaults.gpus == ("{UUID}3", "{UUID}1")
            assert os.environ["CUDA_VISIBLE_DEVICES"] == "3,1,0"
            found = holders(folder_of(request.config))
            assert [(h.uuid, h.pid) for h in found] == [("{UUID}1", os.getpid()), ("{UUID}3", os.getpid())]
            assert all(holder.who == request.node.nodeid for holder in found)

        def test_none(gpu_count, ddp_launcher):
            assert gpu_count == 3
            assert ddp_launcher.defaults.gpus == ()
        """
    )
    run().assert_outcomes(passed=2)


@pytest.mark.skipif("sys.platform != 'linux'", reason="launching ranks needs Linux")
def test_ranks_see_what_the_test_holds(pytester: pytest.Pytester, run_with_torch: Run) -> None:
    pytester.makepyfile(
        f"""
        import os
        import pytest

        @pytest.mark.requires_gpus(2)
        def test_two(ddp_launcher):
            seen = ddp_launcher(lambda: os.environ["CUDA_VISIBLE_DEVICES"], device="cpu").values
            assert seen == ["{UUID}0,{UUID}1"] * 2
        """
    )
    run_with_torch().assert_outcomes(passed=1)


class PretendedRanks(NamedTuple):
    """What stands in the pool for idle ranks with contexts on GPUs, which there are none of here."""

    device: str
    folder: LeaseFolder
    held_at_the_end: list[bool]
    pids: tuple[int, ...] = (1, 2)

    def end(self) -> None:
        self.held_at_the_end.append(bool(holders(self.folder)))


def test_warm_ranks_are_off_the_gpus_before_somebody_else_gets_them(
    pytester: pytest.Pytester, run: Run, folder: LeaseFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    on_cpu, on_cuda = PretendedRanks("cpu", folder, []), PretendedRanks("cuda", folder, [])
    idle = [on_cpu, on_cuda]
    monkeypatch.setattr(warm.POOL, "_idle", idle)
    pytester.makepyfile(TWO_GPUS)
    run().assert_outcomes(passed=1)
    assert on_cuda.held_at_the_end == [True]
    assert on_cpu.held_at_the_end == []  # they end with the outermost session of this process


def test_gpus_is_for_tests_that_hold_some(pytester: pytest.Pytester, run: Run) -> None:
    pytester.makepyfile(test_it="def test_it(gpus): pass")
    result = run()
    result.assert_outcomes(errors=1)
    result.stdout.fnmatch_lines(
        [
            "_* ERROR at setup of test_it _*",
            "test_it.py::test_it: the fixture gpus lists the GPUs that a test holds; "
            "mark the test requires_gpus(n)",
            "=* short test summary info =*",
        ],
        consecutive=True,
    )


def test_no_gpu_in_time_is_an_error_that_names_the_holder(
    pytester: pytest.Pytester, run: Run, all_held: Lease
) -> None:
    pytester.makepyfile(TWO_GPUS)
    result = run("--gputrain-lease-timeout=0.5", "-rA")
    result.assert_outcomes(errors=1)
    assert result.ret == pytest.ExitCode.TESTS_FAILED
    held = f"{UUID}0: another run, pid {os.getpid()}, for "
    result.stdout.fnmatch_lines([f"waited * s for 2 GPUs, held by others: {held}* s; *"])
    assert "leasing.py" not in result.stdout.str()


def test_who_is_skipped_does_not_wait(pytester: pytest.Pytester, run: Run, all_held: Lease) -> None:
    pytester.makepyfile(
        """
        import pytest

        @pytest.mark.skip
        @pytest.mark.requires_gpus(4)
        def test_skip(): pass

        @pytest.mark.skipif(True, reason="not today")
        @pytest.mark.requires_gpus(1)
        def test_skipif(): pass

        @pytest.mark.requires_gpus(8)
        def test_impossible(): pass
        """
    )
    run("--gputrain-lease-timeout=1").assert_outcomes(skipped=3)


def child(folder: Path, *options: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "pytest", "-p", "pytest_gputrain", "-p", "timeout", "-p", "xdist"]
    return subprocess.Popen(
        [*command, "-p", "no:cacheprovider", "-rA", f"--basetemp={folder / 'tmp'}{len(options)}", *options],
        cwd=folder,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def wait_for(folder: LeaseFolder, num_waiting: int) -> None:
    limit = time.monotonic() + 120
    while len(folder.names("wait")) < num_waiting:
        assert time.monotonic() < limit, folder.names("wait")
        time.sleep(0.05)


def test_waiting_is_reported_and_not_charged(
    pytester: pytest.Pytester, folder: LeaseFolder, all_held: Lease
) -> None:
    pytester.makepyfile(TWO_GPUS)
    ways = (
        ["--timeout=20"],
        ["--timeout=20", "--timeout-method=thread"],
        ["--timeout=20", "-o", "timeout_func_only=true"],
        ["--timeout=20", "-n1", "-s", "-q"],
    )
    children = [child(pytester.path, *options) for options in ways]
    wait_for(folder, len(ways))
    time.sleep(21)  # longer than the timeout, which a busy machine must not reach by itself
    all_held.release()
    for process in children:
        output, _ = process.communicate(timeout=120)
        assert process.returncode == 0, output
        told = rf"waited \d+ s for 2 GPUs; held: {UUID}0: another run, pid {os.getpid()}, for"
        assert re.search(told, output), output
        assert "1 passed" in output
    assert holders(folder) == []


def test_two_runs_at_once(pytester: pytest.Pytester, folder: LeaseFolder) -> None:
    pytester.makepyfile(
        """
        import time
        from pathlib import Path
        import pytest

        class TestAlone:
            def alone(self, gpus):
                files = [Path("witness-" + gpu.uuid) for gpu in gpus]
                for file in files:
                    file.touch(exist_ok=False)
                time.sleep(0.05)
                for file in files:
                    file.unlink()

            @pytest.mark.requires_gpus(1)
            @pytest.mark.parametrize("number", range(6))
            def test_one(self, gpus, number): self.alone(gpus)

            @pytest.mark.requires_gpus(2)
            @pytest.mark.parametrize("number", range(4))
            def test_two(self, gpus, number): self.alone(gpus)

            @pytest.mark.requires_gpus(4)
            @pytest.mark.parametrize("number", range(2))
            def test_four(self, gpus, number): self.alone(gpus)
        """
    )
    children = [child(pytester.path, "-n2"), child(pytester.path, "-n2", "-q")]
    for process in children:
        output, _ = process.communicate(timeout=200)
        assert process.returncode == 0, output
        assert "12 passed" in output
    assert holders(folder) == []


@pytest.mark.parametrize("workers", [[], ["-n", "2"]], ids=["alone", "xdist"])
def test_a_bad_lease_folder_is_a_usage_error(
    pytester: pytest.Pytester, run_child: Run, monkeypatch: pytest.MonkeyPatch, workers: list[str]
) -> None:
    monkeypatch.delenv("GPUTRAIN_LEASE_DIR")
    monkeypatch.setenv("TMPDIR", str(pytester.path))
    (pytester.path / "gputrain-leases").touch()
    pytester.makepyfile(TWO_GPUS)
    result = run_child(*workers)
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    assert (
        f"ERROR: lease folder '{pytester.path}/gputrain-leases' is not a folder; give a folder that this "
        "user can write, by --gputrain-lease-dir or GPUTRAIN_LEASE_DIR"
    ) in result.errlines
    assert "Traceback" not in result.stdout.str() + result.stderr.str()
    pytester.makepyfile("def test_needs_none(): pass")
    run_child("-k", "needs_none", *workers).assert_outcomes(passed=1)


def test_a_lease_dir_that_is_a_file_says_where_it_came_from(
    pytester: pytest.Pytester, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    (pytester.path / "taken").touch()
    result = run("--gputrain-lease-dir=taken")
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    assert (
        "ERROR: --gputrain-lease-dir: 'taken' (from the command line) is not legal; "
        "give a folder, there or not yet there"
    ) in result.errlines


def test_a_test_file_can_be_run_without_a_cache(pytester: pytest.Pytester, run: Run) -> None:
    pytester.makepyfile(TWO_GPUS)
    run("-p", "no:cacheprovider").assert_outcomes(passed=1)
