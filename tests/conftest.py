"""What the whole suite needs, and who runs an example of the documentation from a checkout does not."""

from __future__ import annotations

import pytest
from hypothesis import settings

# The same examples in every run, and no health check that a busy machine fails.
settings.load_profile("ci")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests that are allowed the most time first: begun last, one would run while other workers have none."""

    def seconds(item: pytest.Item) -> float:
        marker = item.get_closest_marker("timeout")
        return float(marker.args[0]) if marker is not None else 0.0

    items.sort(key=seconds, reverse=True)
