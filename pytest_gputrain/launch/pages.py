"""Huge pages for the fork server: a fork copies page tables, and an exit tears them down.

torch leaves about 220 MB of anonymous memory in 4 KiB pages. Collapsed into 2 MiB pages, forking a rank and
reaping it cost a fraction (benchmarks/fresh_launch.py). Linux 6.1 or newer; older kernels refuse, and
nothing else changes.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator

_HUGE = 2 << 20
_MADV_COLLAPSE = 25  # linux/mman.h


def collapse() -> Iterator[None]:
    """Collapses this process's private memory, 2 MiB a step, so that the caller can do it while idle."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    for start, end in _private_ranges():
        for address in range(-(-start // _HUGE) * _HUGE, end // _HUGE * _HUGE, _HUGE):
            # Refused where memory is missing or the kernel is old: then the page stays as it is.
            libc.madvise(address, _HUGE, _MADV_COLLAPSE)
            yield


def _private_ranges() -> list[tuple[int, int]]:
    """Address ranges of the heap and of anonymous, private, writable mappings."""
    ranges = []
    with open("/proc/self/maps") as file:
        for line in file:
            addresses, permissions, *rest = line.split()
            name = rest[3] if len(rest) > 3 else ""
            if permissions == "rw-p" and (not name or name == "[heap]" or name.startswith("[anon")):
                start, end = (int(part, 16) for part in addresses.split("-"))
                ranges.append((start, end))
    return ranges
