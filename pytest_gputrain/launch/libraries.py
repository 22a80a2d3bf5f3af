"""Model libraries: a fork server imports them once, so that not every rank of every launch has to."""

from __future__ import annotations

import sys

_LIBRARIES = ("transformers", "timm", "torchvision")
"""Libraries of model definitions: seconds to import, nothing but definitions in them."""


def imported(known: frozenset[str] = frozenset()) -> list[str]:
    """Modules of model libraries that this process has imported, ``known`` aside."""
    return [name for name in tuple(sys.modules) if name.startswith(_LIBRARIES) and name not in known]


def with_models() -> list[str]:
    """Of the modules imported here those that import all others: the libraries, and files of models."""
    return [name for name in imported() if "." not in name or ".modeling_" in name]
