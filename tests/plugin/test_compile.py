"""The fixture ``compile_monitor`` in a session: the summary in the report, and on the ranks of a test."""

from __future__ import annotations

import pytest

from .conftest import Run

needs_linux = pytest.mark.skipif("sys.platform != 'linux'", reason="launching ranks needs Linux")


@needs_linux
def test_the_summary_is_in_the_report_and_ranks_have_it_too(
    pytester: pytest.Pytester, run_child: Run
) -> None:
    """One session for both: what costs is importing torch's compiler."""
    pytester.makepyfile(
        test_it="""
        import torch
        from pytest_gputrain import distributed

        def test_it(compile_monitor):
            double = torch.compile(lambda x: x * 2, backend="eager", dynamic=False)
            with compile_monitor() as monitor:
                double(torch.ones(2))
                double(torch.ones(3))
            assert not monitor.recompiles

        @distributed
        def test_on_ranks(compile_monitor, rank):
            with compile_monitor() as monitor:
                torch.compile(lambda x: x * 2, backend="eager")(torch.ones(2))
            assert monitor.is_compiled()
        """
    )
    result = run_child("--junitxml=junit.xml", "-o", "junit_logging=all")
    result.assert_outcomes(passed=1, failed=1)
    result.stdout.fnmatch_lines(
        [
            "*Captured compile_monitor call*",
            "compiled: 2 graphs in * s, run 2 times; 1 recompile, 0 graph breaks, 0 cache hits",
            "  recompile 1 of test_it.<locals>.<lambda>: tensor 'x' size mismatch at index 0. expected 2, "
            "actual 3   at test_it.py:5 in <lambda>",
        ]
    )
    assert 'name="gputrain_compiled" value="compiled: 2 graphs' in (pytester.path / "junit.xml").read_text()
