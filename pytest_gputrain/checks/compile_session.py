"""A case's model, compiled as the case compiles it, inside a rank: what all compile checks begin with.

On CPU inductor is replaced by a backend that generates no code, unless the context names one: whether a model
stays compiled is decided by dynamo, before any code is generated.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from pytest_gputrain.case import TrainingCase
from pytest_gputrain.checks.context import CheckContext
from pytest_gputrain.checks.result import CheckFailed, CheckSkipped

# Traces forward and backward, functionalised, as inductor gets them, and runs them without generating code.
CPU_BACKEND = "aot_eager"


def backend_for(ctx: CheckContext) -> str | None:
    """The backend in inductor's place; None where the case's own is to be used."""
    return ctx.compile_backend or (CPU_BACKEND if ctx.device == "cpu" else None)


@dataclass(frozen=True)
class Compiled:
    """model: as ``case.model`` built it; compiled: what the loop calls, a module or a function.

    holder: the module with the parameters that train; optimizer: of the loop.
    """

    model: Any
    compiled: Any
    holder: Any
    optimizer: Any

    @property
    def is_wrapped(self) -> bool:
        """Whether the original is another object (``model.compile()`` changes the model itself)."""
        return self.compiled is not self.model


@contextlib.contextmanager
def compiling(ctx: CheckContext, backend: str | None = None) -> Iterator[None]:
    """While it is open, what the case compiles with inductor is compiled with ``backend_for(ctx)`` instead.

    Raises CheckSkipped, with what to install, where the backend cannot work here.
    """
    from pytest_gputrain.compile.backend import standing_in, validate_backend

    chosen = backend or backend_for(ctx)
    if reason := validate_backend(chosen or "inductor", device=ctx.device):
        raise CheckSkipped(reason)
    if chosen is None:
        yield
        return
    with standing_in(chosen):
        yield


def build_compiled(case: TrainingCase, ctx: CheckContext) -> Compiled:
    """Fresh weights, compiled by the case, and its optimizer; within ``compiling``.

    Raises CheckFailed where ``compile`` returns what no loop could call.
    """
    from torch import nn

    from pytest_gputrain.checks.session import as_if_wrapped, build_model, build_optimizer

    model = build_model(case, ctx)
    compiled = case.compile(model)
    if not callable(compiled):
        raise CheckFailed(
            f"compile(model) returned {compiled!r:.60}; it has to return what the loop calls: "
            "torch.compile(model), or the model itself after model.compile()"
        )
    holder = compiled if isinstance(compiled, nn.Module) else model
    # The wrapper itself, so that a step which calls model.module calls what is compiled.
    return Compiled(model, as_if_wrapped(compiled), holder, build_optimizer(case, model, holder))
