"""The markers: what they skip, what they select, and what they say about arguments that are not legal."""

from __future__ import annotations

import pytest

from .conftest import Run

NEEDS_TWO = """
import pytest

@pytest.mark.requires_gpus(2)
def test_two(): pass

def test_none(): pass
"""


@pytest.fixture(autouse=True)
def _one_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GPUTRAIN_FAKE_GPUS", "1x40GB")


def test_requires_gpus_skips_with_the_numbers(pytester: pytest.Pytester, run: Run) -> None:
    pytester.makepyfile(test_it=NEEDS_TWO)
    result = run("-rs")
    result.assert_outcomes(passed=1, skipped=1)
    # The line is the test's own, not one of this plugin.
    result.stdout.fnmatch_lines(
        ["SKIPPED [[]1[]] test_it.py:3: needs 2 GPUs, found 1 (pretended GPU, by GPUTRAIN_FAKE_GPUS)"]
    )


def test_requires_gpus_runs_when_there_are_enough(
    pytester: pytest.Pytester, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GPUTRAIN_FAKE_GPUS", "2")
    pytester.makepyfile(NEEDS_TWO)
    run().assert_outcomes(passed=2)


def test_requires_gpus_respects_visible_devices(
    pytester: pytest.Pytester, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GPUTRAIN_FAKE_GPUS", "2")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    pytester.makepyfile(NEEDS_TWO)
    result = run("-rs")
    result.stdout.fnmatch_lines(
        [
            "SKIPPED * needs 2 GPUs, found 1 (pretended GPU, 1 hidden by CUDA_VISIBLE_DEVICES='1', "
            "by GPUTRAIN_FAKE_GPUS)"
        ]
    )


def test_a_gpu_named_twice_is_said(
    pytester: pytest.Pytester, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GPUTRAIN_FAKE_GPUS", "2")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1,1")
    pytester.makepyfile(NEEDS_TWO)
    result = run("-rs")
    found = (
        "0 (CUDA_VISIBLE_DEVICES='1,1' names GPU 1 twice, so CUDA shows none: name each once, "
        "by GPUTRAIN_FAKE_GPUS)"
    )
    result.stdout.fnmatch_lines([f"gputrain: GPUs found: {found}", f"SKIPPED * needs 2 GPUs, found {found}"])


@pytest.mark.parametrize(
    ("memory", "outcome"), [("'40GB'", "passed"), ("'80GB'", "skipped"), (40 * 10**9, "passed")]
)
def test_requires_memory(pytester: pytest.Pytester, run: Run, memory: str, outcome: str) -> None:
    pytester.makepyfile(
        f"import pytest\n@pytest.mark.requires_gpus(1, memory={memory})\ndef test_large(): pass\n"
    )
    result = run("-rs")
    result.assert_outcomes(**{outcome: 1})
    if outcome == "skipped":
        result.stdout.fnmatch_lines(
            [
                "SKIPPED * needs 1 GPU with 80GB (74.5 GiB), found 1 (pretended GPU 37.3 GiB, "
                "by GPUTRAIN_FAKE_GPUS), 0 of them that large"
            ]
        )


def test_the_closest_marker_counts(pytester: pytest.Pytester, run: Run) -> None:
    pytester.makepyfile(
        """
        import pytest
        pytestmark = pytest.mark.requires_gpus(4)

        @pytest.mark.requires_gpus(1)
        def test_one(): pass

        class TestTwo:
            pytestmark = pytest.mark.requires_gpus(1)
            def test_one(self): pass

        def test_four(): pass
        """
    )
    run().assert_outcomes(passed=2, skipped=1)


def test_unittest_cases_skip_too(pytester: pytest.Pytester, run: Run) -> None:
    pytester.makepyfile(
        """
        import unittest, pytest

        class TestOld(unittest.TestCase):
            @pytest.mark.requires_gpus(2)
            def test_two(self): raise AssertionError("ran")
        """
    )
    run().assert_outcomes(skipped=1)


def test_no_fixture_is_set_up_for_a_skipped_test(pytester: pytest.Pytester, run: Run) -> None:
    pytester.makepyfile(
        """
        import pytest

        @pytest.fixture
        def costly(): raise RuntimeError("set up")

        @pytest.mark.requires_gpus(2)
        def test_two(costly): pass
        """
    )
    run().assert_outcomes(skipped=1)


def test_requires_gpus_adds_gpu_in_time_for_dash_m(pytester: pytest.Pytester, run: Run) -> None:
    pytester.makepyfile(NEEDS_TWO)
    run("-m", "gpu").assert_outcomes(skipped=1, deselected=1)
    run("-m", "not gpu").assert_outcomes(passed=1, deselected=1)


def test_public_names_are_the_markers(pytester: pytest.Pytester, run: Run) -> None:
    pytester.makepyfile(
        """
        from pytest_gputrain import requires_gpus, stability

        @requires_gpus(2)
        def test_two(): pass

        @stability
        def test_long(): pass
        """
    )
    run("--strict-markers").assert_outcomes(skipped=2)


STABILITY = "import pytest\n@pytest.mark.stability(depth=4)\ndef test_long(): pass\n"


def test_stability_runs_only_when_asked_for(
    pytester: pytest.Pytester, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytester.makepyfile(STABILITY)
    result = run("-rs")
    result.assert_outcomes(skipped=1)
    result.stdout.fnmatch_lines(["SKIPPED * a stability run; ask for it with --stability or -m stability"])
    run("--stability").assert_outcomes(passed=1)
    run("-m", "stability").assert_outcomes(passed=1)
    run("-m", "not stability").assert_outcomes(deselected=1)
    monkeypatch.setenv("GPUTRAIN_STABILITY", "1")
    run().assert_outcomes(passed=1)


LEGAL_MEMORY = 'memory must be a size above 0 such as "80GB", "79.1GiB" or a number of bytes'


@pytest.mark.parametrize(
    ("marker", "message"),
    [
        ("requires_gpus(0)", "n must be a whole number from 1 up"),
        ("requires_gpus(-1)", "n must be a whole number from 1 up"),
        ("requires_gpus('two')", "n must be a whole number from 1 up"),
        ("requires_gpus(True)", "n must be a whole number from 1 up"),
        ("requires_gpus(1, memory='lots')", LEGAL_MEMORY),
        ("requires_gpus(1, memory=0)", LEGAL_MEMORY),
        ("requires_gpus(1, memory=1.5)", LEGAL_MEMORY),
        ("requires_gpus(1, 2)", "the marker is requires_gpus(n=1, *, memory=None)"),
        ("requires_gpus(1, cores=2)", "the marker is requires_gpus(n=1, *, memory=None)"),
        ("stability(depth=0)", "depth must be a whole number from 1 up"),
        ("stability(iterations='many')", "iterations must be a whole number from 1 up"),
        ("stability(1, 2, 3)", "the marker is stability(depth=20, iterations=1000)"),
    ],
)
def test_bad_marker_is_a_usage_error(pytester: pytest.Pytester, run: Run, marker: str, message: str) -> None:
    pytester.makepyfile(test_it=f"import pytest\n@pytest.mark.{marker}\ndef test_it(): pass\n")
    result = run()
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    assert f"ERROR: test_it.py::test_it: {marker}: {message}" in result.errlines


def test_bad_marker_is_a_usage_error_under_xdist(pytester: pytest.Pytester, run_child: Run) -> None:
    pytester.makepyfile(test_it="import pytest\n@pytest.mark.requires_gpus(0)\ndef test_it(): pass\n")
    result = run_child("-n", "2")
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    message = "test_it.py::test_it: requires_gpus(0): n must be a whole number from 1 up"
    assert f"ERROR: {message}" in result.errlines
    assert "Traceback" not in result.stdout.str() + result.stderr.str()


def test_markers_are_listed_with_their_signatures(run: Run) -> None:
    result = run("--markers")
    result.stdout.fnmatch_lines_random(
        [
            "@pytest.mark.requires_gpus(n=1, [*], memory=None): *",
            "@pytest.mark.gpu: *",
            "@pytest.mark.stability(depth=20, iterations=1000): *",
        ]
    )
