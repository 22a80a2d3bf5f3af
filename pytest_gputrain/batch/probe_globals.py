"""The process's own state that a training step may change: random generators, flags, global hooks."""

from __future__ import annotations

import contextlib
import random
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.nn.modules import module as module_hooks

Getter = Callable[[], Any]
Setter = Callable[[Any], None]

_CUDNN = ("enabled", "benchmark", "deterministic", "benchmark_limit", "allow_tf32")
_SDP = ("flash", "mem_efficient", "math", "cudnn")


@contextlib.contextmanager
def preserved() -> Iterator[None]:
    """Everything here is on leaving as it was on entering, also after an exception."""
    saved = [(get, put, value) for get, put in _switches() for value in _read(get)]
    generators = _generators()
    try:
        yield
    finally:
        for get, put, value in saved:
            if list(_read(get)) != [value]:
                put(value)
        for restore in generators:
            restore()


def global_hooks() -> list[dict[int, Any]]:
    """The mappings of hooks that torch runs for every module."""
    return [
        held
        for name, held in vars(module_hooks).items()
        if name.startswith("_global_") and isinstance(held, dict)
    ]


def _read(get: Getter) -> Iterator[Any]:
    """The value, or nothing where torch refuses to tell (older and newer precision settings mixed)."""
    with contextlib.suppress(RuntimeError):
        yield get()


def _generators() -> list[Callable[[], None]]:
    """What puts each random generator of the process back."""
    cpu, python = torch.get_rng_state(), random.getstate()
    restore: list[Callable[[], None]] = [lambda: torch.set_rng_state(cpu), lambda: random.setstate(python)]
    if torch.cuda.is_initialized():
        gpus = torch.cuda.get_rng_state_all()
        restore.append(lambda: torch.cuda.set_rng_state_all(gpus))
    return [*restore, _numpy_generator()]


def _numpy_generator() -> Callable[[], None]:
    # Not ``numpy.random``: that would import it, in 40 ms, where nobody has drawn from it yet.
    there = sys.modules.get("numpy.random")
    state = there.get_state() if there is not None else None

    def restore() -> None:
        if (random_now := sys.modules.get("numpy.random")) is None:
            return
        if state is not None:
            random_now.set_state(state)
        else:  # imported meanwhile, and perhaps seeded: as a first import leaves it
            random_now.seed()

    return restore


def _switches() -> Iterator[tuple[Getter, Setter]]:
    yield torch.get_default_dtype, torch.set_default_dtype
    yield torch.is_grad_enabled, _set_grad_enabled
    yield torch.get_num_threads, torch.set_num_threads
    yield torch.get_float32_matmul_precision, torch.set_float32_matmul_precision
    yield _deterministic, lambda value: torch.use_deterministic_algorithms(value[0], warn_only=value[1])
    yield from (_attribute(torch.backends.cudnn, name) for name in _CUDNN)
    yield _attribute(torch.backends.cuda.matmul, "allow_tf32")
    yield from (_sdp(name) for name in _SDP)
    yield torch.is_autocast_cache_enabled, torch.set_autocast_cache_enabled
    for kind in ("cpu", "cuda"):
        yield from _autocast(kind)


def _set_grad_enabled(value: bool) -> None:
    torch.set_grad_enabled(value)


def _deterministic() -> tuple[bool, bool]:
    return torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()


def _attribute(holder: Any, name: str) -> tuple[Getter, Setter]:
    return lambda: getattr(holder, name), lambda value: setattr(holder, name, value)


def _sdp(name: str) -> tuple[Getter, Setter]:
    backend = torch.backends.cuda
    return getattr(backend, f"{name}_sdp_enabled"), getattr(backend, f"enable_{name}_sdp")


def _autocast(kind: str) -> Iterator[tuple[Getter, Setter]]:
    yield lambda: torch.is_autocast_enabled(kind), lambda value: torch.set_autocast_enabled(kind, value)
    yield lambda: torch.get_autocast_dtype(kind), lambda value: torch.set_autocast_dtype(kind, value)
