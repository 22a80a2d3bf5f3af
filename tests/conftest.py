"""What the whole suite needs, and who runs an example of the documentation from a checkout does not."""

from __future__ import annotations

import gc
import signal

import pytest
from hypothesis import HealthCheck, settings

# The same examples in every run, and no health check that a busy machine fails. Hypothesis' own profile "ci"
# says the same, but only in versions newer than the oldest that is declared.
settings.register_profile(
    "suite", derandomize=True, deadline=None, database=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("suite")

# A shell that runs this in the background has it ignore Ctrl-C, which some tests send.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests that are allowed the most time first: begun last, one would run while other workers have none."""

    def seconds(item: pytest.Item) -> float:
        marker = item.get_closest_marker("timeout")
        return float(marker.args[0]) if marker is not None else 0.0

    items.sort(key=seconds, reverse=True)


def pytest_collection_finish() -> None:
    """Half of the time of many a test went into looking for garbage in torch and in all other tests' modules.

    What a test itself makes is collected as ever.
    """
    gc.collect()
    gc.freeze()
