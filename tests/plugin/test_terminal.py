"""What the user reads above and below a run, and when a run without GPUs is red; each also under xdist."""

from __future__ import annotations

import pytest

from .conftest import Run

THREE = """
import pytest

@pytest.mark.requires_gpus(2)
@pytest.mark.parametrize("n", [1, 2])
def test_two(n): pass

@pytest.mark.requires_gpus(1, memory="80GB")
def test_large(): pass

def test_none(): pass
"""

EACH_WAY = pytest.mark.parametrize("workers", [[], ["-n", "2"]], ids=["alone", "xdist"])


@EACH_WAY
def test_header_once(
    pytester: pytest.Pytester, run_each_way: Run, monkeypatch: pytest.MonkeyPatch, workers: list[str]
) -> None:
    monkeypatch.setenv("GPUTRAIN_FAKE_GPUS", "2")
    monkeypatch.delenv("GPUTRAIN_LEASE_DIR")
    pytester.makepyfile("def test_nothing(): pass")
    lines = [line for line in run_each_way(*workers).outlines if "gputrain:" in line]
    assert lines == [
        "gputrain: GPUs found: 2 (2 x pretended GPU, by GPUTRAIN_FAKE_GPUS)",
        "gputrain: timeout 300 s, stall 60 s",
    ]


@EACH_WAY
def test_summary_says_what_did_not_run(
    pytester: pytest.Pytester, run_each_way: Run, monkeypatch: pytest.MonkeyPatch, workers: list[str]
) -> None:
    monkeypatch.setenv("GPUTRAIN_FAKE_GPUS", "1x40GB")
    pytester.makepyfile(THREE)
    result = run_each_way(*workers)
    result.assert_outcomes(passed=1, skipped=3)
    result.stdout.fnmatch_lines(
        [
            "gputrain: 1 test needs 1 GPU with 80GB (74.5 GiB), found 1 (pretended GPU 37.3 GiB, "
            "by GPUTRAIN_FAKE_GPUS), 0 of them that large; it did not run",
            "gputrain: 2 tests need 2 GPUs, found 1 (pretended GPU, by GPUTRAIN_FAKE_GPUS); "
            "none of these ran",
        ]
    )


def test_summary_is_quiet_when_nothing_was_missing(
    pytester: pytest.Pytester, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GPUTRAIN_FAKE_GPUS", "2")
    pytester.makepyfile(THREE)
    result = run("-q")
    result.assert_outcomes(passed=4)
    assert "gputrain" not in result.stdout.str()


@EACH_WAY
def test_required_gpus_missing_ends_the_session_before_any_test(
    pytester: pytest.Pytester, run_each_way: Run, monkeypatch: pytest.MonkeyPatch, workers: list[str]
) -> None:
    monkeypatch.setenv("GPUTRAIN_FAKE_GPUS", "1")
    pytester.makepyfile(f"{THREE}\nraise RuntimeError('collected')")
    result = run_each_way("--require-gpus", "2", *workers)
    assert result.ret == pytest.ExitCode.TESTS_FAILED
    message = (
        "--require-gpus 2: needs 2 GPUs, found 1 (pretended GPU, by GPUTRAIN_FAKE_GPUS); no test was run"
    )
    assert f"Exit: {message}" in result.errlines
    assert "collected" not in result.stdout.str()
    assert "workers" not in result.stdout.str()


NOTHING_RAN = (
    "gputrain: --require-gpus 1: no test marked gpu ran, so this session proves nothing about GPUs and fails"
)


@EACH_WAY
@pytest.mark.parametrize(
    "selection",
    [["-k", "test_two"], ["-k", "test_none"], ["-k", "nothing_at_all"], ["-m", "gpu", "-k", "test_two"]],
    ids=["all-skipped", "none-selected", "nothing-selected", "gpu-all-skipped"],
)
def test_required_gpus_unused_are_red(
    pytester: pytest.Pytester,
    run_each_way: Run,
    monkeypatch: pytest.MonkeyPatch,
    workers: list[str],
    selection: list[str],
) -> None:
    monkeypatch.setenv("GPUTRAIN_FAKE_GPUS", "1")
    pytester.makepyfile(THREE)
    result = run_each_way("--require-gpus", "1", *selection, *workers)
    assert result.ret == pytest.ExitCode.TESTS_FAILED
    assert NOTHING_RAN in result.outlines


@EACH_WAY
def test_required_gpus_used_are_green(
    pytester: pytest.Pytester, run_each_way: Run, monkeypatch: pytest.MonkeyPatch, workers: list[str]
) -> None:
    monkeypatch.setenv("GPUTRAIN_FAKE_GPUS", "1")
    pytester.makepyfile(THREE)
    result = run_each_way("--require-gpus", "1", *workers)
    result.assert_outcomes(passed=2, skipped=2)
    assert result.ret == pytest.ExitCode.OK


@pytest.mark.parametrize(
    ("body", "code"),
    [
        ("pytest.skip('not today')", pytest.ExitCode.TESTS_FAILED),
        ("pytest.xfail('known')", pytest.ExitCode.OK),
        ("assert False", pytest.ExitCode.TESTS_FAILED),
    ],
    ids=["skips-itself", "xfails", "fails"],
)
def test_what_counts_as_run_on_a_gpu(
    pytester: pytest.Pytester, run: Run, monkeypatch: pytest.MonkeyPatch, body: str, code: int
) -> None:
    monkeypatch.setenv("GPUTRAIN_FAKE_GPUS", "1")
    pytester.makepyfile(f"import pytest\n@pytest.mark.requires_gpus(1)\ndef test_it(): {body}\n")
    result = run("--require-gpus", "1")
    assert result.ret == code
    assert (NOTHING_RAN in result.outlines) == ("skip" in body)


def test_a_folder_named_gpu_is_no_gpu_test(
    pytester: pytest.Pytester, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GPUTRAIN_FAKE_GPUS", "1")
    folder = pytester.mkdir("gpu")
    (folder / "test_gpu.py").write_text("def test_gpu(): pass\n")
    assert run("--require-gpus", "1").ret == pytest.ExitCode.TESTS_FAILED


def test_collect_only_does_not_ask_what_ran(
    pytester: pytest.Pytester, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GPUTRAIN_FAKE_GPUS", "1")
    pytester.makepyfile(THREE)
    assert run("--require-gpus", "1", "--collect-only").ret == pytest.ExitCode.OK


def test_zero_required_is_no_requirement(
    pytester: pytest.Pytester, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GPUTRAIN_FAKE_GPUS", "0")
    pytester.makeini("[pytest]\ngputrain_require_gpus = 4\n")
    pytester.makepyfile("def test_nothing(): pass")
    assert run("--require-gpus", "0").ret == pytest.ExitCode.OK
    assert run().ret == pytest.ExitCode.TESTS_FAILED


def test_other_failures_keep_their_exit_code(
    pytester: pytest.Pytester, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GPUTRAIN_FAKE_GPUS", "1")
    pytester.makepyfile("import nothing_of_that_name")
    assert run("--require-gpus", "1").ret == pytest.ExitCode.INTERRUPTED


def test_junit_report_survives_the_properties(
    pytester: pytest.Pytester, run_child: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GPUTRAIN_FAKE_GPUS", "1")
    pytester.makepyfile(THREE)
    assert run_child("-n", "1", "--junitxml=out.xml").ret == pytest.ExitCode.OK
    assert 'name="gputrain_shortage"' in (pytester.path / "out.xml").read_text()
