"""Which list, dict, set or deque of a rank grew in its last steps: who holds what is no tensor.

Numbers and strings have no owner that Python could be asked for; what they were put into has.
"""

from __future__ import annotations

import gc
from array import array
from collections import OrderedDict, defaultdict, deque
from collections.abc import Mapping, Sequence
from itertools import islice
from typing import Any

_TYPES = frozenset({list, dict, set, deque, OrderedDict, defaultdict})
_FROM = 4  # shorter ones are most of all, and hold little
_EACH_STEP, _FEWEST = 0.04, 8
_SAMPLE, _PARTS = 8, 200  # of what was added last, and of the parts of each
_MOST_NAMED = 16
_USERS = ("pytest_gputrain.case", "pytest_gputrain.reference")


class Lengths:
    """How long each container is now; by address, in some hundred KiB."""

    def __init__(self, step: int) -> None:
        self.step = step
        those = [one for one in gc.get_objects() if type(one) in _TYPES and len(one) >= _FROM]
        self._where = array("Q", map(id, those))
        self._long = array("Q", map(len, those))

    def grown(self, steps: int) -> list[Any]:
        """The containers that were there then and have grown by one in 25 steps or more: by what they took
        since, the largest first.
        """
        before = dict(zip(self._where, self._long, strict=True))
        least, found = max(_FEWEST, steps * _EACH_STEP), []
        for one in gc.get_objects():
            if type(one) in _TYPES and len(one) - before.get(id(one), len(one)) >= least:
                found.append((_weight(one) * (len(one) - before[id(one)]), one))
        found.sort(key=lambda pair: pair[0], reverse=True)
        return [one for _, one in found[:_MOST_NAMED]]


def _weight(container: Any) -> float:
    """Objects that one of those added last is made of, and refers to alone or not."""
    last = list(islice(reversed(container), _SAMPLE)) if not isinstance(container, set) else []
    if isinstance(container, Mapping):
        last = [container[key] for key in last]
    return sum(_parts(one) for one in last) / len(last) if last else 1.0


def _parts(value: Any) -> int:
    seen, left = 0, [value]
    while left and seen < _PARTS:
        seen += 1
        one = left.pop()
        if type(one) in _TYPES or isinstance(one, tuple):
            left += gc.get_referents(one)
    return seen


def _is_ours(value: Any) -> bool:
    """What watches the run hangs on the model's parameters; a case and a reference model are the user's."""
    module = str(getattr(type(value), "__module__", ""))
    return module.startswith("pytest_gputrain.") and not module.startswith(_USERS)


def holder_of(containers: Sequence[Any], known: Mapping[str, Any]) -> str:
    """The variable of the first that has one, in words; "" for none."""
    from pytest_gputrain.memory.references import Walk

    if not containers:
        return ""
    walk = Walk()
    walk.near(known)
    for one in containers:
        if (holder := walk.holder(one)) is not None and not walk.passes(one, _is_ours):
            return f"{holder} ({type(one).__name__} of {len(one):,})"
    return ""
