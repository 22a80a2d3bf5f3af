"""Tells an exception of the user's code, a bug to be seen, from one of discovery, a reason to fall back."""

from __future__ import annotations

import contextlib
import traceback
from collections.abc import Iterator
from pathlib import Path

_MARK = "_gputrain_users_own"
_PACKAGE = f"{Path(__file__).resolve().parents[1]}/"


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


def raised_by_user(error: BaseException) -> bool:
    """Whether the user's code raised it: a bug to be shown with its traceback, even where it is a ValueError.

    What this package refuses about a result of that code (a loss that is no scalar) is not the user's.
    """
    if not getattr(error, _MARK, False):
        return False
    frames = traceback.extract_tb(error.__traceback__)
    return not (frames and str(Path(frames[-1].filename).resolve()).startswith(_PACKAGE))
