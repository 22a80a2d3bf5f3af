"""What a user may write for a size or a duration: the same rules wherever it is written."""

from __future__ import annotations

import math
import re

LEGAL_FLAG = "true or false"
LEGAL_SECONDS = "a number of seconds above 0"
# A step of the smallest model takes more. Less is a forgotten unit: capacity=80.
LEAST_CAPACITY = 2**16
LEGAL_SIZE = 'a size above 0 such as "80GB", "79.1GiB" or a number of bytes'

TRUE = ("true", "1", "yes", "on")
FALSE = ("false", "0", "no", "off")

# Vendors sell "80 GB" and mean at least 80 * 10**9 bytes; GiB is there for those who mean 2**30.
UNITS = {
    "": 1,
    "B": 1,
    "KB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "TB": 10**12,
    "KIB": 2**10,
    "MIB": 2**20,
    "GIB": 2**30,
    "TIB": 2**40,
}


def parse_flag(text: str) -> bool:
    """Return what a flag written as text means. Raises ``ValueError`` saying what is legal."""
    if text.lower() not in (*TRUE, *FALSE):
        raise ValueError(f"{text!r} is not {LEGAL_FLAG}")
    return text.lower() in TRUE


def parse_seconds(text: str) -> float:
    """Return ``text`` in seconds. Raises ``ValueError`` when it is not above 0, or is not a finite number."""
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not 0 < seconds < math.inf:
        raise ValueError(f"{text!r} is not {LEGAL_SECONDS}")
    return seconds


def parse_size(size: str | float) -> int:
    """Return ``size`` in bytes, ``80e9`` as well. Raises ``ValueError`` saying what is legal."""
    __tracebackhide__ = True
    number, unit = math.nan, ""
    if (isinstance(size, int) and not isinstance(size, bool)) or (
        isinstance(size, float) and size.is_integer()
    ):
        number = size
    elif isinstance(size, str) and (match := re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", size)):
        number, unit = float(match[1]), match[2].upper()
    if unit not in UNITS or not number * UNITS[unit] >= 1:
        raise ValueError(f"{size!r} is not {LEGAL_SIZE}")
    return int(number * UNITS[unit])


def parse_limit(size: str | float) -> int:
    """Return ``size`` in bytes, as `parse_size`; as text "80" lacks its unit."""
    __tracebackhide__ = True
    num_bytes = parse_size(size)
    if isinstance(size, str) and num_bytes < LEAST_CAPACITY and size.strip().isdigit():
        raise ValueError(f'{size!r} is {num_bytes} bytes; give the unit, such as "80GB" or "79.1GiB"')
    return num_bytes


def capacity_in_bytes(capacity: str | float) -> int:
    """Return a device's capacity in bytes. Raises ``ValueError`` for less than 64 KiB, a unit forgotten."""
    __tracebackhide__ = True
    try:
        size = parse_size(capacity)
    except ValueError as error:
        raise ValueError(f"capacity: {error}") from None
    if size < LEAST_CAPACITY:
        raise ValueError(
            f"capacity={capacity!r} is {format_size(size)}; legal is {format_size(LEAST_CAPACITY)} or more: "
            'give the unit, such as "80GB" or "79.1GiB"'
        )
    return size


def format_size(num_bytes: int) -> str:
    """Return ``num_bytes`` for people, in binary units: ``79.6 GiB``."""
    for unit, scale in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if num_bytes >= scale:
            return f"{num_bytes / scale:.1f} {unit}"
    return f"{num_bytes} bytes"
