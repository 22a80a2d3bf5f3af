"""``distributed``: what is legal in it and which tests it fits, said before anything runs."""

from __future__ import annotations

import pytest

from .conftest import Run

SIGNATURE = (
    "distributed(world_size=2, backend=None, device=None, isolation='fresh', timeout=None, stall=None, "
    "env=None)"
)
PLAIN = "def test_it(): pass"


@pytest.mark.parametrize(
    ("marker", "message"),
    [
        ("distributed(0)", "world_size=0: must be an integer from 1 to 512"),
        ("distributed(world_size='two')", "world_size='two': must be an integer from 1 to 512"),
        ("distributed(backend='mpi')", "backend='mpi': must be one of 'gloo', 'nccl', 'cpu:gloo,cuda:nccl'"),
        ("distributed(device='tpu')", "device='tpu': must be one of 'cpu', 'cuda'"),
        (
            "distributed(device='cpu', backend='nccl')",
            "backend='nccl' needs device='cuda'; on device='cpu' use backend='gloo'",
        ),
        ("distributed(timeout=0)", "timeout=0: must be a positive number of seconds; *"),
        ("distributed(env={'A': 1})", "env['A']=1: names and values must be strings; write '1'"),
        ("distributed(ranks=2)", f"the marker is {SIGNATURE}"),
    ],
)
def test_bad_marker_is_a_usage_error(pytester: pytest.Pytester, run: Run, marker: str, message: str) -> None:
    pytester.makepyfile(test_it=f"import pytest\n@pytest.mark.{marker}\n{PLAIN}\n")
    result = run()
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    whole = f"ERROR: test_it.py::test_it: {marker}: {message}"
    assert result.errlines[0].startswith(whole.removesuffix("*"))


def test_bad_isolation_names_the_legal_ones(pytester: pytest.Pytester, run: Run) -> None:
    pytester.makepyfile(f"import pytest\n@pytest.mark.distributed(isolation='frozen')\n{PLAIN}\n")
    assert "isolation='frozen': must be one of 'fresh'" in run().errlines[0]


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("@distributed\nasync def test_it(): pass", "an async function cannot run on ranks; *"),
        (
            "import unittest\nclass TestIt(unittest.TestCase):\n  @distributed\n  def test_it(self): pass",
            "a method of unittest.TestCase cannot run on ranks; *",
        ),
        (
            "@distributed(world_size=4)\n@pytest.mark.requires_gpus(2)\ndef test_it(): pass",
            "requires_gpus(2) and world_size=4: each rank has one GPU, so the two numbers must be the same, "
            "or device='cpu'",
        ),
        (
            "@distributed(backend='nccl')\ndef test_it(): pass",
            "backend='nccl' needs device='cuda' or the marker requires_gpus(2)",
        ),
        (
            "from hypothesis import given, strategies as st\n@distributed\n@given(st.integers())\n"
            "def test_it(n): pass",
            "hypothesis would draw other examples on every rank; *",
        ),
    ],
    ids=["async", "unittest", "gpus", "backend", "hypothesis"],
)
def test_a_test_that_does_not_fit(pytester: pytest.Pytester, run: Run, source: str, message: str) -> None:
    pytester.makepyfile(test_it=f"import pytest\nfrom pytest_gputrain import distributed\n{source}\n")
    result = run()
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines([f"ERROR: test_it.py::*test_it: distributed: {message}".replace("[", "[[]")])


def test_trace_cannot_enter_ranks(pytester: pytest.Pytester, run: Run) -> None:
    pytester.makepyfile(test_it=f"import pytest\n@pytest.mark.distributed\n{PLAIN}\n")
    assert run("--trace").errlines[0] == (
        "ERROR: test_it.py::test_it: distributed: --trace cannot enter ranks; add --gputrain-alone to run "
        "the body as one rank in this process"
    )


def test_gpus_by_marker_or_device(
    pytester: pytest.Pytester, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GPUTRAIN_FAKE_GPUS", "1")
    pytester.makepyfile(
        test_it="""
        import pytest
        from pytest_gputrain import distributed, requires_gpus

        @distributed
        @requires_gpus(2)
        def test_marker(): pass

        @distributed(world_size=2, device="cuda")
        def test_device(): pass

        @distributed(world_size=4, device="cpu")
        @requires_gpus(2)
        def test_both(): pass
        """
    )
    result = run("-rs", "-m", "gpu")
    result.assert_outcomes(skipped=3)
    result.stdout.fnmatch_lines(["SKIPPED * needs 2 GPUs, found 1 (pretended GPU, by GPUTRAIN_FAKE_GPUS)*"])


def test_the_users_own_fixtures_of_these_names_win(pytester: pytest.Pytester, run: Run) -> None:
    pytester.makepyfile(
        """
        import pytest

        @pytest.fixture(params=["a", "b"])
        def device(request): return request.param

        @pytest.fixture
        def rank(): return 7

        def test_it(device, rank): assert device in "ab" and rank == 7
        """
    )
    run().assert_outcomes(passed=2)
