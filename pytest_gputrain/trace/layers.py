"""A model's layers and branches, as far as they can be seen from outside."""

from __future__ import annotations

from typing import Any

from pytest_gputrain.trace.names import canonical_name


def layer_list(model: Any) -> tuple[str, list[Any]]:
    """(name, layers) of the longest list of modules of one class, the outermost of equals; else ("", []).

    A ``Sequential`` counts only where the model has no such ``ModuleList``.
    """
    from torch import nn

    for container in (nn.ModuleList, nn.Sequential):
        lists = [
            (canonical_name(name), list(module))
            for name, module in model.named_modules()
            if isinstance(module, container) and len({type(layer) for layer in module}) == 1
        ]
        if lists:
            return max(lists, key=lambda found: len(found[1]))
    return "", []


def layers_of(model: Any) -> list[Any]:
    """The layers of ``layer_list``; empty without one."""
    return layer_list(model)[1]


def branched_modules(model: Any) -> dict[str, Any]:
    """By name, the modules that can be left with one branch: those with a method ``force_branch(name)``."""
    return {
        canonical_name(name) or type(model).__name__: module
        for name, module in model.named_modules()
        if callable(getattr(type(module), "force_branch", None))
    }


def branches_of(model: Any) -> list[str]:
    """The branches that modules declare: an attribute ``branches`` beside a method ``force_branch(name)``."""
    modules = branched_modules(model).values()
    declared = [str(name) for module in modules for name in getattr(module, "branches", ())]
    return list(dict.fromkeys(declared))
