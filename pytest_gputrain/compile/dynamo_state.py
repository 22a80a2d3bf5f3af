"""What a monitored block may change for the next test, and what it is put back to."""

from __future__ import annotations

import contextlib
import copy
import importlib
import logging
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from typing import Any

_CONFIGS = ("torch._dynamo.config", "torch._inductor.config", "torch._functorch.config")
_VARIABLES = ("TORCH", "AOT_", "TRITON_", "DISABLE_CUPTI_LAZY_REINIT", "TEARDOWN_CUPTI")
"""torch.compile itself sets the last two, for CUDA graphs."""


@contextlib.contextmanager
def restored() -> Iterator[int]:
    """Dynamo is reset before and after; configuration, environment, stance, callbacks and logging put back.

    Yields how many functions had been compiled in this process before.
    """
    before = _compiled_functions()
    with contextlib.ExitStack() as stack:
        for kept in (_config_kept, _environment_kept, _logging_kept, _stance_kept, _callbacks_kept):
            stack.enter_context(kept())
        stack.enter_context(_no_thread_of_progress_bars())
        stack.enter_context(_modules_kept())
        _reset()
        try:
            yield before
        finally:
            _reset()


def _reset() -> None:
    import torch._dynamo

    with warnings_are_no_errors():  # a backend with CUDA graphs imports inductor for this
        torch._dynamo.reset()


def _compiled_functions() -> int:
    from torch._dynamo import convert_frame

    codes = getattr(getattr(convert_frame, "input_codes", None), "seen", [])
    return sum(1 for code in codes if code() is not None)


@contextlib.contextmanager
def _config_kept() -> Iterator[None]:
    before = {name: _values(importlib.import_module(name)) for name in _CONFIGS}
    try:
        yield
    finally:
        for name, values in before.items():
            module: Any = sys.modules[name]
            now = _values(module)
            for key, value in values.items():
                if now[key] is not value and now[key] != value:
                    setattr(module, key, value)


def _values(config: Any) -> dict[str, Any]:
    copy_of: Any = getattr(config, "get_config_copy", None) or config.shallow_copy_dict  # before torch 2.9
    return dict(copy_of())


@contextlib.contextmanager
def _environment_kept() -> Iterator[None]:
    before = _variables()
    try:
        yield
    finally:
        for name in _variables().keys() - before.keys():
            del os.environ[name]
        os.environ.update(before)


def _variables() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name.startswith(_VARIABLES)}


@contextlib.contextmanager
def _logging_kept() -> Iterator[None]:
    """Levels and torch's list of artifacts: ``torch._logging.set_logs`` within the block ends with it."""
    from torch._logging import _internal

    state = copy.deepcopy(_internal.log_state)
    before = {
        logger: (logger.level, logger.disabled, logger.propagate, list(logger.handlers))
        for logger in _loggers()
    }
    try:
        yield
    finally:
        _internal.log_state = state
        for logger, (level, disabled, propagate, handlers) in before.items():
            if logger.level != level:
                logger.setLevel(level)
            logger.disabled, logger.propagate = disabled, propagate
            if logger.handlers != handlers:
                logger.handlers[:] = handlers


def _loggers() -> list[logging.Logger]:
    known = logging.Logger.manager.loggerDict
    return [
        logger
        for name, logger in list(known.items())
        if isinstance(logger, logging.Logger) and (name == "torch" or name.startswith("torch."))
    ]


@contextlib.contextmanager
def _stance_kept() -> Iterator[None]:
    """``torch.compiler.set_stance`` called as a function holds until the end of the process."""
    from torch._dynamo import eval_frame

    before = getattr(eval_frame, "_stance", None)
    try:
        yield
    finally:
        if getattr(eval_frame, "_stance", None) is not before:
            eval_frame._stance = before  # type: ignore[assignment]


@contextlib.contextmanager
def _callbacks_kept() -> Iterator[None]:
    """A reset forgets the callbacks that somebody has registered for the start and end of compilations."""
    from torch._dynamo.callback import callback_handler

    before = list(callback_handler.start_callbacks), list(callback_handler.end_callbacks)
    try:
        yield
    finally:
        callback_handler.start_callbacks[:], callback_handler.end_callbacks[:] = before


@contextlib.contextmanager
def _modules_kept() -> Iterator[None]:
    """The first ``torch.compile`` of a process replaces functions of ``torch.nn.Module``, and marks that."""
    from torch.nn import Module

    mark = "___needs_generation_tag_patch"
    marked, before = mark in vars(Module), {name: vars(Module)[name] for name in ("__init__", "__setstate__")}
    try:
        yield
    finally:
        now = [vars(Module)[name] for name in before]
        if not marked and all(function.__module__.startswith("torch._dynamo") for function in now):
            for name, function in before.items():
                setattr(Module, name, function)
            delattr(Module, mark)


@contextlib.contextmanager
def _no_thread_of_progress_bars() -> Iterator[None]:
    """Torch runs a graph under a progress bar, shown or not; tqdm's first one starts a thread for good."""
    bars: Any = importlib.import_module("torch.hub").tqdm
    if not hasattr(bars, "monitor_interval"):  # torch's own stand-in, where tqdm is not installed
        yield
        return
    before, bars.monitor_interval = bars.monitor_interval, 0
    try:
        yield
    finally:
        bars.monitor_interval = before


@contextlib.contextmanager
def warnings_are_no_errors() -> Iterator[None]:
    """Dynamo looks at what warns when looked at, and takes for granted that a warning does not raise.

    Where warnings are errors, as in many a test suite, it would end in an internal error.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("default", module=r"torch\.")
        yield


def quietly(original: Callable[..., Any]) -> Callable[..., Any]:
    """Torch's own warnings are no errors in this function either."""

    def watched(*args: Any, **kwargs: Any) -> Any:
        with warnings_are_no_errors():
            return original(*args, **kwargs)

    return watched
