"""Loads that a case makes by itself with ``strict=False``: whether anything of what they were given fits."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from pytest_gputrain.checks.saved_state import PREFIX


@dataclass(frozen=True)
class Load:
    """given, expected: how many keys the state and the module have; loaded: in both.

    lost: given keys that would fit but for torch.compile's prefix. example: one of those that do not fit, and
    one of the module's.
    """

    given: int
    expected: int
    loaded: int
    lost: int
    example: str
    location: str


@contextlib.contextmanager
def watched_loads() -> Iterator[list[Load]]:
    """The loads that are made inside and are not strict, through torch's own ``load_state_dict``."""
    from torch import nn

    found: list[Load] = []
    plain = nn.Module.load_state_dict

    def load(self: Any, state_dict: Any, strict: bool = True, assign: bool = False) -> Any:
        if not strict:
            found.append(_look(self, state_dict))
        return plain(self, state_dict, strict=strict, assign=assign)

    nn.Module.load_state_dict = load  # type: ignore[method-assign]
    try:
        yield found
    finally:
        nn.Module.load_state_dict = plain  # type: ignore[method-assign]


def _look(module: Any, state: Any) -> Load:
    given, expected = list(state), list(module.state_dict())
    fitting, by_plain_name = {*given} & {*expected}, {_plain(name): name for name in expected}
    lost = [name for name in given if name not in fitting and _plain(name) in by_plain_name]
    pair = (lost[0], by_plain_name[_plain(lost[0])]) if lost else (*given[:1], *expected[:1])
    example = ", where it has ".join(pair) if len(pair) == 2 else ""
    return Load(len(given), len(expected), len(fitting), len(lost), example, _calling_line())


def _plain(name: str) -> str:
    return name.replace(PREFIX, "")


def _calling_line() -> str:
    from pytest_gputrain.launch.stacks import Frame, user_frame

    frames, frame = [], sys._getframe(1)
    here: Any = frame
    while here is not None:
        frames.append(Frame(here.f_code.co_filename, here.f_lineno, here.f_code.co_name))
        here = here.f_back
    return str(user_frame(frames) or "?")
