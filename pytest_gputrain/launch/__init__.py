"""Start ranks, watch them, end them: ``launch(fn, world_size=2)`` and ``launch.torchrun("train.py")``.

This module can be called, because ``launch`` is both the public function and the room it lives in:
``from pytest_gputrain import launch`` and ``import pytest_gputrain.launch`` name the same thing.
"""

from __future__ import annotations

import sys
import types
from typing import TYPE_CHECKING, Any

from .errors import LaunchCancelled, LaunchError, LaunchUsageError, UnsupportedPlatform
from .records import Cause, RankError, RankResult, Verdict

if TYPE_CHECKING:
    from .launcher import Launcher
    from .request import LaunchDefaults
    from .result import LaunchResult
    from .warm import shutdown

__all__ = [
    "Cause",
    "LaunchCancelled",
    "LaunchDefaults",
    "LaunchError",
    "LaunchResult",
    "LaunchUsageError",
    "Launcher",
    "RankError",
    "RankResult",
    "UnsupportedPlatform",
    "Verdict",
    "shutdown",
]

# Imported when first asked for: loading the plugin must stay cheap.
_LAZY = {"Launcher": "launcher", "LaunchDefaults": "request", "LaunchResult": "result", "shutdown": "warm"}


class _CallableModule(types.ModuleType):
    """The module, callable as the default ``Launcher``."""

    def __call__(self, *args: Any, **kwargs: Any) -> LaunchResult:
        from .launcher import launch

        return launch(*args, **kwargs)

    @property
    def torchrun(self) -> Any:
        """``Launcher.torchrun`` of the default launcher."""
        from .launcher import launch

        return launch.torchrun

    def __getattr__(self, name: str) -> Any:
        if name in _LAZY:
            import importlib

            return getattr(importlib.import_module(f"{__name__}.{_LAZY[name]}"), name)
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


sys.modules[__name__].__class__ = _CallableModule
