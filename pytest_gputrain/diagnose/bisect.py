"""The smallest range of layers that still fails. Pure."""

from __future__ import annotations

from collections.abc import Callable

Range = tuple[int, int]  # half open


def smallest_failing(whole: Range, fails: Callable[[Range], bool]) -> Range:
    """A range within ``whole``, which fails, of which neither half, nor the rest without an end, fails.

    One bad layer among n takes about 2 log2(n) tries. Layers that fail only together are found from both
    ends, one layer a try. Asks for no range twice.
    """
    seen: dict[Range, bool] = {}

    def bad(part: Range) -> bool:
        if part not in seen:
            seen[part] = fails(part)
        return seen[part]

    low, high = whole
    while high - low > 1:
        middle = (low + high) // 2
        parts = [(low, middle), (middle, high)]
        if high - low > 2:  # layers that fail only together: drop one at either end
            parts += [(low + 1, high), (low, high - 1)]
        smaller = next((part for part in parts if bad(part)), None)
        if smaller is None:
            break
        low, high = smaller
    return low, high
