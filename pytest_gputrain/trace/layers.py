"""A model's layers and branches, as far as they can be seen from outside."""

from __future__ import annotations

from typing import Any


def layers_of(model: Any) -> list[Any]:
    """The longest ``ModuleList`` that the model has, the outermost of equals; empty without one."""
    from torch import nn

    lists = [list(module) for module in model.modules() if isinstance(module, nn.ModuleList)]
    return max(lists, key=len, default=[])


def branches_of(model: Any) -> list[str]:
    """The branches that modules declare: an attribute ``branches`` beside a method ``force_branch(name)``."""
    declared = [
        str(name)
        for module in model.modules()
        if callable(getattr(type(module), "force_branch", None))
        for name in getattr(module, "branches", ())
    ]
    return list(dict.fromkeys(declared))
