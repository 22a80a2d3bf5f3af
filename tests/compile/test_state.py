"""What a monitored block changes does not reach the next test."""

from __future__ import annotations

import logging
import os
from typing import Any

import torch
import torch._logging

from pytest_gputrain import compile_monitor

_logging: Any = torch._logging


def _seen() -> object:
    dynamo, inductor, functorch = _modules()

    loggers = [
        (name, logger.level, logger.disabled, logger.propagate, list(logger.handlers))
        for name, logger in sorted(logging.Logger.manager.loggerDict.items())
        if isinstance(logger, logging.Logger) and name.startswith("torch")
    ]
    return (
        [config.get_config_copy() for config in (dynamo.config, inductor.config, functorch.config)],
        dict(os.environ),
        loggers,
        dynamo.eval_frame._stance,
        list(dynamo.callback_handler.start_callbacks),
        dynamo.convert_frame._compile,
        dynamo.convert_frame.format_error_msg,
        dynamo.output_graph.OutputGraph.call_user_compiler,
        dynamo.decorators._set_stance,
        _logging.trace_structured,
    )


def _modules() -> tuple[Any, Any, Any]:
    import torch._dynamo
    import torch._functorch.config
    import torch._inductor.config

    return torch._dynamo, torch._inductor, torch._functorch


def test_everything_is_as_before() -> None:
    dynamo, inductor, _ = _modules()
    dynamo.callback_handler.register_start_callback(_nothing)
    try:
        with compile_monitor():  # what torch makes when it is first used
            torch.compile(lambda x: x + 1, backend="eager")(torch.ones(2))
        before = _seen()
        with compile_monitor() as monitor:
            torch.compile(lambda x: x + 1, backend="eager")(torch.ones(2))
            torch._dynamo.config.cache_size_limit = 3
            torch._dynamo.config.reorderable_logging_functions.add(print)
            inductor.config.max_autotune = not inductor.config.max_autotune
            os.environ["TORCH_LOGS"] = "recompiles"
            _logging.set_logs(dynamo=logging.ERROR)
            torch.compiler.set_stance("force_eager")
        assert monitor.is_compiled()
        assert _seen() == before
    finally:
        dynamo.callback_handler.remove_start_callback(_nothing)


def test_also_after_an_exception() -> None:
    with compile_monitor():
        pass
    before = _seen()
    try:
        with compile_monitor():
            torch._dynamo.config.suppress_errors = True
            raise KeyboardInterrupt
    except KeyboardInterrupt:
        pass
    assert _seen() == before
    with compile_monitor():  # and the next may be entered
        pass


def test_a_variable_of_the_users_own_stays() -> None:
    with compile_monitor():
        os.environ["OF_THE_USER"] = "1"
    assert os.environ.pop("OF_THE_USER") == "1"


def _nothing(_args: object) -> None:
    pass
