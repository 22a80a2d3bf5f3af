"""Tells an exception of the user's code, a bug to be seen, from one of discovery, a reason to fall back."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

_MARK = "_gputrain_users_own"


@contextlib.contextmanager
def users_own() -> Iterator[None]:
    """What is raised in here comes from the user's model, optimizer, batch or step."""
    try:
        yield
    except Exception as error:
        with contextlib.suppress(AttributeError):  # an exception with __slots__
            setattr(error, _MARK, True)
        raise


def is_users_own(error: BaseException) -> bool:
    """Whether it was raised by the user's code, or is about what the user asked for."""
    return isinstance(error, ValueError) or getattr(error, _MARK, False)
