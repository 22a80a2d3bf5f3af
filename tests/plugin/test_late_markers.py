"""Markers that come late, and conditions that cannot be evaluated: the test's own trouble, and never more."""

from __future__ import annotations

import pytest

from .conftest import Run


@pytest.fixture(autouse=True)
def _four_pretended_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GPUTRAIN_FAKE_GPUS", "4")


ADDS = """
import pytest

{decorator}
def pytest_collection_modifyitems(items):
    items[0].add_marker(pytest.mark.{marker})
"""
LATE = ["", "@pytest.hookimpl(trylast=True)"]


@pytest.mark.parametrize("decorator", LATE)
def test_a_conftest_adds_requires_gpus(pytester: pytest.Pytester, run: Run, decorator: str) -> None:
    pytester.makeconftest(ADDS.format(decorator=decorator, marker="requires_gpus(3)"))
    pytester.makepyfile("def test_it(gpus): assert len(gpus) == 3")
    run().assert_outcomes(passed=1)
    if not decorator:
        run("-m", "gpu").assert_outcomes(passed=1)


@pytest.mark.parametrize("decorator", LATE)
@pytest.mark.parametrize(
    ("marker", "line"),
    [
        ("requires_gpus('two')", "requires_gpus('two'): n must be a whole number from 1 up"),
        (
            "distributed(world_size=0)",
            "distributed(world_size=0): world_size=0: must be an integer from 1 to 512",
        ),
    ],
)
def test_a_conftest_adds_what_is_not_legal(
    pytester: pytest.Pytester, run: Run, decorator: str, marker: str, line: str
) -> None:
    pytester.makeconftest(ADDS.format(decorator=decorator, marker=marker))
    pytester.makepyfile(test_it="def test_it(): pass")
    result = run()
    assert result.ret is pytest.ExitCode.USAGE_ERROR
    assert result.errlines[0] == f"ERROR: test_it.py::test_it: {line}"


@pytest.mark.skipif("sys.platform != 'linux'", reason="launching ranks needs Linux")
@pytest.mark.parametrize("decorator", LATE)
def test_a_conftest_adds_distributed(pytester: pytest.Pytester, run: Run, decorator: str) -> None:
    pytester.makeconftest(ADDS.format(decorator=decorator, marker="distributed(world_size=2)"))
    pytester.makepyfile("import os\ndef test_it(): assert os.environ['WORLD_SIZE'] == '2'")
    run().assert_outcomes(passed=1)


def test_a_fixture_adds_distributed(pytester: pytest.Pytester, run: Run) -> None:
    pytester.makepyfile(
        """
        import pytest

        @pytest.fixture
        def late(request): request.node.add_marker(pytest.mark.distributed)

        def test_it(late): pass
        """
    )
    result = run()
    result.assert_outcomes(failed=1)
    assert (
        "distributed was added while the test ran, too late for its ranks; add the marker at collection"
        in result.outlines
    )


def test_conditions_that_cannot_be_evaluated(pytester: pytest.Pytester, run: Run) -> None:
    pytester.makepyfile(
        """
        import pytest

        class Torn:
            def __bool__(self): raise RuntimeError("neither")

        @pytest.mark.requires_gpus(2)
        @pytest.mark.skipif(Torn(), reason="never said")
        def test_torn(): pass

        @pytest.mark.requires_gpus(2)
        @pytest.mark.skipif("1 / 0", reason="never said")
        def test_text(): pass

        @pytest.mark.requires_gpus(2)
        def test_after(gpus): assert len(gpus) == 2
        """
    )
    run().assert_outcomes(passed=1, errors=2)


def test_a_poisoned_context_keeps_no_lease(pytester: pytest.Pytester, run: Run) -> None:
    """What torch says here it says after a device-side assertion: of CUDA nothing else is asked."""
    pytester.makepyfile(
        """
        import sys, types
        import pytest

        def poisoned(): raise RuntimeError("CUDA error: device-side assert triggered")

        @pytest.mark.requires_gpus(4)
        def test_poisons():
            cuda = types.SimpleNamespace(is_initialized=lambda: True, empty_cache=poisoned)
            sys.modules["torch"] = types.SimpleNamespace(cuda=cuda)

        @pytest.mark.requires_gpus(4)
        def test_next(gpus):
            del sys.modules["torch"]
            assert len(gpus) == 4
        """
    )
    run("--gputrain-lease-timeout=30").assert_outcomes(passed=2)
