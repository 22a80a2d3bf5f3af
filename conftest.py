"""What the whole suite needs and pytest allows only here."""

from __future__ import annotations

pytest_plugins = ["pytester"]
