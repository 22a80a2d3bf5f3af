"""Inductor told to draw its random numbers as eager code does: dropout then drops the same, and steps
compare.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator


@contextlib.contextmanager
def eager_random_numbers() -> Iterator[None]:
    """Within the block. Does nothing where this torch has no such setting: then other numbers are drawn."""
    try:
        from torch._inductor import config

        patched = config.patch(fallback_random=True)
    except (ImportError, AttributeError):
        yield
        return
    with patched:
        yield
