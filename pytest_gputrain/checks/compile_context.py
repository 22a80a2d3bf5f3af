"""Which backend compiles in a check of torch.compile."""

from __future__ import annotations

import contextlib

from pytest_gputrain.checks.context import CheckContext
from pytest_gputrain.checks.result import CheckSkipped

ON_CPU = "aot_eager"  # the forward and backward that inductor would get, without generating code


def backend_of(ctx: CheckContext) -> contextlib.AbstractContextManager[None]:
    """In inductor's place: the context's; on a CPU ``aot_eager``; on CUDA what the case compiles with.

    Raises CheckSkipped where it cannot compile here, with what to install.
    """
    from pytest_gputrain.compile.backend import standing_in, validate_backend

    name = ctx.compile_backend or (ON_CPU if ctx.device == "cpu" else "inductor")
    if lacking := validate_backend(name, ctx.device):
        raise CheckSkipped(lacking)
    return standing_in(name)
