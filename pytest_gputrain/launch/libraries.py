"""Modules that a fork server imports once, so that not every rank of every launch has to."""

from __future__ import annotations

import sys

_LIBRARIES = ("transformers", "timm", "torchvision", "pytest_gputrain")
"""Model libraries, which take seconds to import, and this package: nothing but definitions in any of them."""
_OF_TORCH = (
    "torch._dynamo.", "torch._functorch.", "torch._inductor.", "torch._export.", "torch.export.",
    "torch.distributed.tensor.", "torch.distributed.algorithms.",
)  # fmt: skip
"""Parts of torch that it imports when they are first used, compiling for a second: definitions too."""


def imported(known: frozenset[str] = frozenset()) -> list[str]:
    """Modules of these libraries that this process has imported, ``known`` aside."""
    ours = (*_LIBRARIES, *_OF_TORCH)
    return [name for name in tuple(sys.modules) if name.startswith(ours) and name not in known]


def with_models() -> list[str]:
    """Of the modules imported here those that import all others: the libraries, and files of models."""
    return [name for name in imported() if "." not in name or ".modeling_" in name]
