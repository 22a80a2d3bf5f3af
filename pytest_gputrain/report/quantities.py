"""Numbers as people read them: four digits, a unit that fits, the same width in a column. Pure."""

from __future__ import annotations

import math

# By unit of the report: (from this value on, divided by, shown as), the largest first.
_SCALES: dict[str, tuple[tuple[float, float, str], ...]] = {
    "s": ((120, 60, "min"), (1, 1, "s"), (1e-3, 1e-3, "ms"), (0, 1e-6, "µs")),
    "bytes": ((2**40, 2**40, "TiB"), (2**30, 2**30, "GiB"), (2**20, 2**20, "MiB"), (2**10, 2**10, "KiB")),
}
_ALIASES = {"seconds": "s", "second": "s", "byte": "bytes", "B": "bytes"}


def fitting(unit: str, largest: float) -> tuple[float, str]:
    """What to divide by so that ``largest`` reads well, and the name of the unit it is then in."""
    for least, divisor, name in _SCALES.get(_ALIASES.get(unit, unit), ()):
        if abs(largest) >= least > 0 or (least == 0 and largest):
            return divisor, name
    return 1.0, _ALIASES.get(unit, unit)


def quantity(value: float, unit: str = "") -> str:
    """``1.5 GiB``, ``12.3 ms``, ``45,120 tokens/s``, ``3``. What is not finite is said, not rounded."""
    divisor, name = fitting(unit, value)
    # Three digits say as much of sizes and times as a reader can use.
    return f"{number(value / divisor, 3 if name != unit else 4)} {name}".rstrip()


def number(value: float, digits: int = 4) -> str:
    """Four digits, thousands apart, small ones as ``1.2e-7``."""
    if not math.isfinite(value):
        return "not a number" if math.isnan(value) else "∞" if value > 0 else "−∞"
    if value == int(value) and abs(value) < 1e15:
        return f"{int(value):,}"
    if abs(value) >= 10 ** (digits - 1):
        return f"{value:,.0f}"
    text = f"{value:.{digits}g}"
    mantissa, e, exponent = text.partition("e")
    return f"{mantissa}e{int(exponent)}" if e else text


def duration(seconds: float) -> str:
    """``0.03 s``, ``4.2 s``, ``3 min 12 s``, ``2 h 5 min``."""
    if not math.isfinite(seconds):
        return "?"
    if seconds < 10:
        return f"{seconds:.2f} s" if seconds < 1 else f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600:,} h {whole % 3600 // 60} min"


def plural(count: int, word: str, several: str | None = None) -> str:
    """``1 test``, ``3 tests``, ``10,000 tests``."""
    return f"{count:,} {word if count == 1 else several or word + 's'}"
