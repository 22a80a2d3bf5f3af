"""Where stability runs show how far they are in a pytest session."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

import pytest

from pytest_gputrain.endurance.progress import SCREEN, Screen


@contextlib.contextmanager
def progress_shown(config: pytest.Config) -> Iterator[None]:
    """While a test runs."""
    token = SCREEN.set(_screen_of(config))
    try:
        yield
    finally:
        SCREEN.reset(token)


def _screen_of(config: pytest.Config) -> Screen | None:
    """The terminal, past the capture; None in a worker of xdist, which has none."""
    if hasattr(config, "workerinput"):
        return None
    writer = config.get_terminal_writer()
    # Colours are for terminals; whoever forbids them gets a line a minute.
    in_place = writer.hasmarkup and not os.environ.get("CI")
    return Screen(lambda text: writer.write(text if in_place else f"\n{text}", flush=True), in_place)
