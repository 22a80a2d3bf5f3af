"""A case's model, compiled as the case compiles it; inside a rank, within ``compile_context.backend_of``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from pytest_gputrain.case import TrainingCase
from pytest_gputrain.checks.context import CheckContext
from pytest_gputrain.checks.result import CheckFailed


@dataclass(frozen=True)
class Compiled:
    """model: as ``case.model`` built it; compiled: what the loop calls, a module or a function.

    holder: the module with the parameters that train, whose state is saved; optimizer: of the loop.
    """

    model: Any
    compiled: Any
    holder: Any
    optimizer: Any

    @property
    def is_wrapped(self) -> bool:
        """Whether the original is another object (``model.compile()`` changes the model itself)."""
        return self.compiled is not self.model


def build_compiled(case: TrainingCase, ctx: CheckContext) -> Compiled:
    """Fresh weights, compiled by the case, and its optimizer.

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
