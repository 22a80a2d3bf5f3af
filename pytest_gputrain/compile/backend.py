"""Which backend compiles: whether it can here, and another one in the place of inductor."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import shutil
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

OLDEST_TORCH = (2, 8)
STAND_INS = ("eager", "aot_eager")
"""Backends that need no code generation: capture alone, and capture with AOTAutograd's backward."""

_standing: str | None = None


def standing_name() -> str | None:
    """The backend that stands in for inductor now, or None."""
    return _standing


def validate_backend(name: str, device: str = "cpu") -> str | None:
    """Return why this backend cannot compile here and what to install, or None when it can.

    Raises ValueError, one line with the legal names, for a name that torch does not know.
    """
    import torch

    version = tuple(int(part) for part in torch.__version__.split(".")[:2])
    if version < OLDEST_TORCH:
        needed = ".".join(map(str, OLDEST_TORCH))
        return f"torch {torch.__version__} is too old for the compile checks; install torch {needed} or newer"
    from torch._dynamo import list_backends

    legal = sorted({*list_backends(exclude_tags=()), *STAND_INS})
    if name not in legal:
        raise ValueError(
            f"unknown compile backend {name!r}; torch {torch.__version__} has {', '.join(legal)}"
        )
    if name != "inductor":
        return None
    return _inductor_lacks(torch.device(device).type)


def _inductor_lacks(kind: str) -> str | None:
    if kind == "cuda":
        if importlib.util.find_spec("triton") is None:
            return "inductor generates Triton code for a GPU, and triton is not installed; pip install triton"
        return None if _compiler(("cc", "gcc", "clang"), "CC") else _no_compiler("CC", "C")
    if not _compiler(("g++", "clang++"), "CXX"):
        return _no_compiler("CXX", "C++")
    include = Path(sysconfig.get_paths()["include"])
    if not (include / "Python.h").exists():
        return (
            f"inductor compiles against Python.h, which is not in {include}; install Python's headers "
            "(apt install python3-dev), or use the backend aot_eager"
        )
    return None


def _no_compiler(variable: str, language: str) -> str:
    chosen = f", and {variable}={os.environ[variable]!r} is none" if os.environ.get(variable) else ""
    return (
        f"inductor needs a {language} compiler, and there is none on the PATH{chosen}; install one "
        f"(apt install g++, or set {variable}), or use the backend aot_eager"
    )


def _compiler(usual: tuple[str, ...], variable: str) -> str | None:
    """The path of a compiler: the one that the variable names, else the first usual one on the PATH."""
    if chosen := os.environ.get(variable):
        return shutil.which(chosen.split()[0])
    return next((found for name in usual if (found := shutil.which(name))), None)


@contextlib.contextmanager
def standing_in(backend: str) -> Iterator[None]:
    """While it is open, what would be compiled with inductor is compiled with ``backend``.

    However it is asked for: ``torch.compile(...)`` with a mode or options, ``model.compile()``, a region, a
    decorator from before, DDP's split graphs. ``dynamic`` and ``fullgraph`` stay as given, and so does a
    backend other than inductor. Dynamo is reset at both ends, so that no graph of one is run for the other.
    ``standing_in("inductor")`` changes nothing. Raises ValueError for an unknown backend.
    """
    global _standing
    if (lacking := validate_backend(backend)) and backend != "inductor":
        raise RuntimeError(lacking)
    import torch
    from torch._dynamo.backends import registry

    if backend == "inductor":
        yield
        return
    compiler: Any = registry.lookup_backend(backend)
    registry.lookup_backend("inductor")  # so that it is there to be replaced

    def compile_instead(*args: Any, **_options: Any) -> Any:
        return compiler(*args[-2:])  # the wrapper's method has itself before module and inputs

    def asked_for(self: Any) -> dict[str, Any]:
        return dict(self.config)  # the real one imports all of inductor, in seconds and with warnings

    compile_instead.__name__ = backend
    compile_instead._tags = ()  # type: ignore[attr-defined]  # as a registered backend has
    wrapper: Any = torch._TorchCompileInductorWrapper
    outer = _standing
    torch._dynamo.reset()
    with (
        mock.patch.object(wrapper, "__call__", compile_instead),
        mock.patch.object(wrapper, "get_compiler_config", asked_for),
        mock.patch.object(wrapper, "reset"),  # of CUDA graphs, which there are none of
        mock.patch.dict(registry._COMPILER_FNS, inductor=compile_instead),
    ):
        _standing = backend
        try:
            yield
        finally:
            _standing = outer
            torch._dynamo.reset()
