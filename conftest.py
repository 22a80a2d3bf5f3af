"""What the whole suite needs and pytest allows only here."""

from __future__ import annotations

from hypothesis import settings

pytest_plugins = ["pytester"]

# The same examples in every run, and no health check that a busy machine fails.
settings.load_profile("ci")
