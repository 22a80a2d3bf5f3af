"""What a check that was stopped has left to say comes after all that pytest says."""

from __future__ import annotations

import pytest

from pytest_gputrain.endurance.progress import LAST_WORDS


def test_pytest_says_it_last(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(
        """
        from pytest_gputrain.endurance.progress import LAST_WORDS

        def test_stopped():
            LAST_WORDS.append("the same command goes on from step 20")
            raise KeyboardInterrupt
        """
    )
    result = pytester.runpytest_inprocess("-p", "pytest_gputrain", no_reraise_ctrlc=True)
    assert result.ret == pytest.ExitCode.INTERRUPTED
    assert result.outlines[-1] == "gputrain: the same command goes on from step 20"
    assert not LAST_WORDS
