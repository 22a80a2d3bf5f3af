"""The fixtures, as a test uses them: real launches, real outcomes."""

from __future__ import annotations

from pathlib import Path

import pytest

from pytest_gputrain.plugin.launcher import folder_name

from .conftest import Run

needs_linux = pytest.mark.skipif("sys.platform != 'linux'", reason="launching ranks needs Linux")
FAKE_UUID = "GPU-fa4e0000-0000-0000-0000-000000000"


@pytest.mark.parametrize(
    ("fake", "visible", "number"),
    [("8", None, 8), ("8", "0,3", 2), ("8", "", 0), ("0", None, 0), ("2", f"{FAKE_UUID}001", 1)],
)
def test_gpu_count(
    pytester: pytest.Pytester,
    run: Run,
    monkeypatch: pytest.MonkeyPatch,
    fake: str,
    visible: str | None,
    number: int,
) -> None:
    monkeypatch.setenv("GPUTRAIN_FAKE_GPUS", fake)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    pytester.makepyfile(f"def test_it(gpu_count): assert gpu_count == {number}")
    run().assert_outcomes(passed=1)


@needs_linux
def test_launcher_passes_and_returns_by_rank(pytester: pytest.Pytester, run_with_torch: Run) -> None:
    pytester.makepyfile(
        """
        def test_it(ddp_launcher):
            def rank_plus(x):
                import torch.distributed as dist
                return dist.get_rank() + x
            assert ddp_launcher(rank_plus, 40, world_size=2).values == [40, 41]
        """
    )
    run_with_torch().assert_outcomes(passed=1)


FAILING = """
def test_it(ddp_launcher):
    def boom():
        raise ValueError("boom")
    ddp_launcher(boom)
"""


@needs_linux
def test_a_failure_shows_the_cause_first_and_nothing_above_it(
    pytester: pytest.Pytester, run_with_torch: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    pytester.makepyfile(test_it=FAILING)
    result = run_with_torch()
    result.assert_outcomes(failed=1)
    first = result.outlines.index(next(line for line in result.outlines if line.startswith("____")))
    assert "raised ValueError: boom" in result.outlines[first + 1]
    assert "test_it.py:3" in result.outlines[first + 1]
    result.stdout.fnmatch_lines(
        ["FAILED test_it.py::test_it - LaunchError: FAILED after * raised ValueError: boom*"]
    )
    assert "plugin/launcher.py" not in result.stdout.str()


@needs_linux
def test_a_failure_can_be_caught(pytester: pytest.Pytester, run_with_torch: Run) -> None:
    pytester.makepyfile(
        """
        import pytest
        from pytest_gputrain import LaunchError, Verdict

        def boom():
            raise ValueError("boom")

        def test_caught(ddp_launcher):
            with pytest.raises(LaunchError, match="boom") as caught:
                ddp_launcher(boom)
            assert caught.value.result.verdict is Verdict.FAILED

        def test_not_checked(ddp_launcher):
            assert ddp_launcher(boom, check=False).verdict is Verdict.FAILED
        """
    )
    run_with_torch().assert_outcomes(passed=2)


@needs_linux
def test_a_skip_on_all_ranks_skips_the_test(pytester: pytest.Pytester, run_with_torch: Run) -> None:
    pytester.makepyfile(
        test_it="""
        import unittest
        import pytest

        def test_pytest(ddp_launcher):
            def skip(): pytest.skip("not on this machine")
            ddp_launcher(skip)

        def test_unittest(ddp_launcher):
            def skip(): raise unittest.SkipTest("not on this machine")
            ddp_launcher(skip)
        """
    )
    result = run_with_torch("-rs")
    result.assert_outcomes(skipped=2)
    result.stdout.fnmatch_lines(["SKIPPED [[]1[]] test_it.py:6: *not on this machine*"])


@needs_linux
def test_bad_input_is_a_usage_error_and_a_value_error(pytester: pytest.Pytester, run_with_torch: Run) -> None:
    pytester.makepyfile(
        """
        import pytest
        from pytest_gputrain.launch import LaunchUsageError

        @pytest.mark.parametrize("kind", [pytest.UsageError, ValueError, LaunchUsageError])
        def test_caught(ddp_launcher, kind):
            with pytest.raises(kind, match="world_size=0"):
                ddp_launcher(print, world_size=0)
            with pytest.raises(kind, match="nothing.py"):
                ddp_launcher.torchrun("nothing.py")

        def test_shown(ddp_launcher):
            ddp_launcher(print, world_size=0)
        """
    )
    result = run_with_torch()
    result.assert_outcomes(passed=3, failed=1)
    result.stdout.fnmatch_lines(["E * LaunchUsageError: world_size=0*"])
    assert "launch/launcher.py" not in result.stdout.str()


@needs_linux
def test_settings_reach_the_launch(
    pytester: pytest.Pytester, run_with_torch: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytester.makepyfile(
        """
        import pytest

        def test_here(ddp_launcher):
            assert (ddp_launcher.defaults.timeout, ddp_launcher.defaults.stall) == (7, 3)
            assert ddp_launcher.defaults.device == "cpu"

        @pytest.mark.requires_gpus(1)
        def test_there(ddp_launcher):
            assert ddp_launcher.defaults.device == "cuda"
        """
    )
    monkeypatch.setenv("GPUTRAIN_FAKE_GPUS", "1")
    run_with_torch("--gputrain-timeout=7", "--gputrain-stall=3").assert_outcomes(passed=2)


@needs_linux
def test_artifacts_go_to_the_report_folder_by_test(pytester: pytest.Pytester, run_with_torch: Run) -> None:
    pytester.makepyfile(
        test_it="""
        def test_launches(ddp_launcher):
            first, second = ddp_launcher(int), ddp_launcher(int)
            assert first.artifacts != second.artifacts

        def test_does_not(ddp_launcher): pass
        """
    )
    run_with_torch("--gputrain-report=report").assert_outcomes(passed=2)
    folders = {path.name for path in (pytester.path / "report").iterdir() if path.is_dir()}
    assert folders == {"test_it.py-test_launches", "records"}


def test_folder_names_differ_where_tests_do() -> None:
    assert folder_name("tests/a/test_x.py::TestA::test_b") == "tests-a-test_x.py-TestA-test_b"
    assert folder_name("test_x.py::test_b[a/b]") != folder_name("test_x.py::test_b[a-b]")
    long = "test_x.py::test_" + "b" * 300
    assert folder_name(long + "1") != folder_name(long + "2")
    assert len(folder_name(long)) < 140
    assert Path(folder_name("../../etc::test_b[../..]")).parent == Path()


@needs_linux
def test_nothing_is_left_of_the_fork_servers(pytester: pytest.Pytester, run_child: Run) -> None:
    import psutil

    pytester.makepyfile("def test_it(ddp_launcher): ddp_launcher(int)")
    run_child("-n", "2").assert_outcomes(passed=1)
    folder = str(pytester.path)
    left = []
    for process in psutil.process_iter(["pid", "cmdline"]):
        try:
            if process.pid != psutil.Process().pid and process.cwd() == folder:
                left.append(process.info)
        except psutil.Error:
            continue
    assert left == []


@needs_linux
def test_a_session_inside_of_a_test_leaves_the_fork_servers_of_the_outer_one(
    pytester: pytest.Pytester, run_with_torch: Run
) -> None:
    from pytest_gputrain import launch
    from pytest_gputrain.launch import client

    launch(int)
    servers = [server.pid for server in client._idle]
    pytester.makepyfile("def test_it(ddp_launcher): ddp_launcher(int)")
    run_with_torch().assert_outcomes(passed=1)
    assert [server.pid for server in client._idle if server.alive] == servers != []


def test_grad_tracer(pytester: pytest.Pytester, run_with_torch: Run) -> None:
    pytester.makepyfile(
        """
        import torch

        def test_it(grad_tracer):
            model = torch.nn.ModuleDict({"used": torch.nn.Linear(2, 2), "unused": torch.nn.Linear(2, 2)})
            with grad_tracer(model) as traced:
                model["used"](torch.ones(1, 2)).sum().backward()
            assert set(traced.arrived) == {"used.weight", "used.bias"}
            assert traced.missing == ["unused.weight", "unused.bias"]
        """
    )
    run_with_torch().assert_outcomes(passed=1)


@needs_linux
def test_checks_called_from_a_test_keep_to_the_sessions_options(
    pytester: pytest.Pytester, run_with_torch: Run
) -> None:
    pytester.makepyfile(
        """
        import time, torch
        from pytest_gputrain import TrainingCase, parametrize_with_checks

        def loss(model, batch):
            time.sleep(60)

        slow = TrainingCase(
            name="slow",
            model=lambda: torch.nn.Linear(2, 2),
            batch=lambda n, device: torch.ones(n, 2),
            loss=loss,
        )

        @parametrize_with_checks([slow], checks=["gradients_arrive"])
        def test_training(case, check):
            check(case)
        """
    )
    result = run_with_torch("--gputrain-timeout=2", "--gputrain-report=kept")
    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(["gradients_arrive?slow? FAILED: HUNG after 2.*", "*artifacts: *kept*"])
    assert list(pytester.path.glob("kept/*/*/rank0/stacks.txt"))
