"""``--share-gpu``: what runs instead of skipping, and that it is called what it is, everywhere."""

from __future__ import annotations

import pytest

from .conftest import Run

EACH_WAY = pytest.mark.parametrize("workers", [[], ["-n", "2"]], ids=["alone", "xdist"])

THREE = """
import pytest

@pytest.mark.requires_gpus(2)
@pytest.mark.parametrize("n", [1, 2])
def test_two(n): pass

@pytest.mark.requires_gpus(2, memory="41GB")
def test_large(): pass

@pytest.mark.requires_gpus(1)
def test_one(): pass
"""


@EACH_WAY
def test_runs_and_says_so(
    pytester: pytest.Pytester, run_each_way: Run, monkeypatch: pytest.MonkeyPatch, workers: list[str]
) -> None:
    monkeypatch.setenv("GPUTRAIN_FAKE_GPUS", "1x80GB")
    pytester.makepyfile(THREE)
    result = run_each_way("--share-gpu", "--junitxml=out.xml", *workers)
    result.assert_outcomes(passed=3, skipped=1)
    line = "gputrain: 2 tests shared 1 GPU between ranks; nothing here is a multi-GPU result"
    assert line in result.outlines
    header = "gputrain: share-gpu True (from the command line), timeout 300 s, stall 60 s"
    assert any(line.startswith(header) for line in result.outlines)
    told = (
        '<property name="gputrain_shared_gpu" value="needs 2 GPUs, found 1 (pretended GPU, by '
        'GPUTRAIN_FAKE_GPUS): shared, not a multi-GPU result"'
    )
    assert (pytester.path / "out.xml").read_text().count(told) == 2


@pytest.mark.parametrize("how", ["environment", "ini"])
def test_twins(pytester: pytest.Pytester, run: Run, monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    monkeypatch.setenv("GPUTRAIN_FAKE_GPUS", "1x80GB")
    if how == "environment":
        monkeypatch.setenv("GPUTRAIN_SHARE_GPU", "yes")
    else:
        pytester.makeini("[pytest]\ngputrain_share_gpu = true\n")
    pytester.makepyfile(THREE)
    run().assert_outcomes(passed=3, skipped=1)


def test_without_a_gpu_it_still_skips(
    pytester: pytest.Pytester, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GPUTRAIN_FAKE_GPUS", "0")
    pytester.makepyfile(THREE)
    result = run("--share-gpu", "-rs")
    result.assert_outcomes(skipped=4)
    assert "--share-gpu lets" not in result.stdout.str()
    assert "shared" not in result.stdout.str()


@EACH_WAY
def test_shared_runs_do_not_meet_require_gpus(
    pytester: pytest.Pytester, run_each_way: Run, monkeypatch: pytest.MonkeyPatch, workers: list[str]
) -> None:
    monkeypatch.setenv("GPUTRAIN_FAKE_GPUS", "1")
    pytester.makepyfile(THREE)
    result = run_each_way("--share-gpu", "--require-gpus=1", "-k", "test_two", *workers)
    assert result.ret == pytest.ExitCode.TESTS_FAILED
    line = (
        "gputrain: --require-gpus 1: no test marked gpu ran but those that shared one, "
        "so this session proves nothing about GPUs and fails"
    )
    assert line in result.outlines


def test_require_gpus_counts_gpus_and_not_shares(
    pytester: pytest.Pytester, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GPUTRAIN_FAKE_GPUS", "1")
    pytester.makepyfile(THREE)
    assert run("--share-gpu", "--require-gpus=2").ret == pytest.ExitCode.TESTS_FAILED
    assert run("--share-gpu", "--require-gpus=1").ret == pytest.ExitCode.OK  # test_one had a GPU of its own


def test_a_refused_launch_shared_nothing_and_is_said_once(
    pytester: pytest.Pytester, run_with_torch: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GPUTRAIN_FAKE_GPUS", "1")
    pytester.makepyfile(
        """
        import pytest

        @pytest.mark.requires_gpus(2)
        @pytest.mark.distributed(2)
        def test_it(): pass
        """
    )
    result = run_with_torch("--share-gpu")
    result.assert_outcomes(failed=1)
    text = result.stdout.str()
    assert "between ranks" not in text
    assert "During handling" not in text
    assert [line[:29] for line in result.outlines].count("GPUs found here are pretended") == 1


# Real ranks on the CPU, placed as on a machine with one GPU.
AS_WITH_ONE_GPU = """
from pytest_gputrain.launch import request

LABEL = "2 ranks shared 1 GPU (NVIDIA H200) through gloo: not a multi-GPU result"

def placement(device, backend, ranks, environ, *, share_gpu):
    assert (device, share_gpu) == ("cuda", True)
    return request.Placement("cpu", "gloo", LABEL)

request.placement = placement
"""

LAUNCHES = """
import pytest

pytestmark = pytest.mark.requires_gpus(2)

def test_passes(ddp_launcher):
    assert ddp_launcher(int).shared_gpu

def test_fails(ddp_launcher):
    def boom(): raise ValueError("boom")
    ddp_launcher(boom)

def test_script(ddp_launcher):
    ddp_launcher.torchrun(__file__)
"""


@pytest.mark.parametrize("workers", [pytest.param([], id="alone", marks=pytest.mark.nightly), ["-n", "2"]])
@pytest.mark.skipif("sys.platform != 'linux'", reason="launching ranks needs Linux")
def test_launches_are_labelled(
    pytester: pytest.Pytester, run_child: Run, monkeypatch: pytest.MonkeyPatch, workers: list[str]
) -> None:
    monkeypatch.setenv("GPUTRAIN_FAKE_GPUS", "1")
    pytester.makeconftest(AS_WITH_ONE_GPU)
    pytester.makepyfile(LAUNCHES)
    options = ["--share-gpu", "-rA", "--junitxml=out.xml", "-o", "junit_logging=all"]
    result = run_child(*options, *workers)
    result.assert_outcomes(passed=1, failed=1, skipped=1)
    label = "2 ranks shared 1 GPU (NVIDIA H200) through gloo: not a multi-GPU result"
    assert f"  {label}" in result.outlines  # below the cause
    document = (pytester.path / "out.xml").read_text()
    assert document.count(f'<property name="gputrain_shared_gpu" value="{label}"') == 2
    result.stdout.fnmatch_lines(
        [
            "SKIPPED * needs 2 GPUs, found 1 (pretended GPU, by GPUTRAIN_FAKE_GPUS); --share-gpu is for "
            "functions, scripts choose their own device"
        ]
    )
    assert (
        "gputrain: 2 tests shared 1 GPU between ranks; nothing here is a multi-GPU result" in result.outlines
    )
