"""Modules that a fork server imports once, so that not every rank of every launch has to."""

from __future__ import annotations

import sys

_LIBRARIES = ("transformers", "timm", "torchvision", "pytest_gputrain")
"""Model libraries, which take seconds to import, and this package: nothing but definitions in any of them."""


def imported(known: frozenset[str] = frozenset()) -> list[str]:
    """Modules of these libraries that this process has imported, ``known`` aside."""
    return [name for name in tuple(sys.modules) if name.startswith(_LIBRARIES) and name not in known]


def with_models() -> list[str]:
    """Of the modules imported here those that import all others: the libraries, and files of models."""
    return [name for name in imported() if "." not in name or ".modeling_" in name]
