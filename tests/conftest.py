"""What the whole suite needs, and who runs an example of the documentation from a checkout does not."""

from __future__ import annotations

from hypothesis import settings

# The same examples in every run, and no health check that a busy machine fails.
settings.load_profile("ci")
