"""What a test tells the terminal and JUnit about itself: strings, and nothing else.

Under xdist a report crosses processes, and one value in ``user_properties`` that is not a string ends the
whole session: everything this plugin writes there goes through ``add``.
"""

from __future__ import annotations

import pytest

GPU = "gputrain_gpu"
SHORTAGE = "gputrain_shortage"
SHARED = "gputrain_shared_gpu"
REFUSED = "gputrain_refused"
LEASE = "gputrain_lease"
ARTIFACTS = "gputrain_artifacts"
PEAK_MEMORY = "gputrain_peak_memory"
COMPILED = "gputrain_compiled"
VERDICT = "gputrain_verdict"
CAUSE = "gputrain_cause"
OUTCOME = "gputrain_outcome"


def add(item: pytest.Item, name: str, value: object) -> None:
    """Add a property to the test's report, as text, and once."""
    if (name, str(value)) not in item.user_properties:
        item.user_properties.append((name, str(value)))


def texts(item: pytest.Item, name: str) -> list[str]:
    """Return the properties of that name."""
    return [str(value) for key, value in item.user_properties if key == name]


def has(item: pytest.Item, name: str) -> bool:
    """Whether the test's report has a property of that name."""
    return bool(texts(item, name))
