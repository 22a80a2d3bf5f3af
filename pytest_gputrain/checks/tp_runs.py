"""Where a tensor-parallel comparison runs: on real ranks, or in one process that simulates them.

The comparisons are ``tensor_parallel``'s; a check chooses one, runs it and says what it came to.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from pytest_gputrain.case import TrainingCase
from pytest_gputrain.checks.context import CheckContext
from pytest_gputrain.checks.ranks import alone, on_ranks
from pytest_gputrain.checks.result import CheckFailed, CheckOutcome, CheckSkipped, Figures
from pytest_gputrain.checks.tp_plan import end_on_bad_plan

# (case, mesh, *arguments) -> a record, the same on every rank of the mesh.
Comparison = Callable[..., Any]
NO_PLAN = "no tensor-parallel plan given: TrainingCase(parallelize=...), see docs/tensor-parallel.md"


def compared(comparison: Comparison, case: TrainingCase, ctx: CheckContext, *args: Any, doing: str) -> Any:
    """The record of ``comparison(case, mesh, *args)`` on ``ctx.world_size`` ranks.

    doing: what the ranks do, for the message, completed by how many they are. Raises CheckSkipped without a
    plan, CheckFailed where the case cannot be compared, and what ``on_ranks`` raises.
    """
    if case.parallelize is None:
        raise CheckSkipped(NO_PLAN)
    end_on_bad_plan(case, ctx)
    if ctx.simulated:
        doing = f"{doing} on {ctx.world_size} simulated ranks"
        return alone(_simulated, case, ctx, comparison, args, doing=doing)
    doing = f"{doing} on {ctx.world_size} ranks"
    return on_ranks(_real, case, ctx, comparison, args, world_size=ctx.world_size, doing=doing)[0]


def refuse_simulated(ctx: CheckContext, why: str) -> None:
    """Raises CheckSkipped where ranks are simulated."""
    if ctx.simulated:
        raise CheckSkipped(f"not on simulated ranks: {why}")


def labelled(ctx: CheckContext, figures: Figures) -> Figures:
    """The figures with what they were measured on: never to be taken for real ranks' where they are not."""
    ranks = {"simulated ranks": ctx.world_size} if ctx.simulated else {"ranks": ctx.world_size}
    return {**ranks, **figures}


def fail(ctx: CheckContext, message: str, figures: Figures) -> None:
    """Raises CheckFailed, the first line labelled where ranks are simulated."""
    label = f" (on {ctx.world_size} simulated ranks)" if ctx.simulated else ""
    first, newline, rest = message.partition("\n")
    raise CheckFailed(f"{first}{label}{newline}{rest}", labelled(ctx, figures))


def mesh_of(ctx: CheckContext) -> Any:
    """All ranks in one dimension, called "tp"."""
    from torch.distributed.device_mesh import init_device_mesh

    return init_device_mesh(ctx.device, (ctx.world_size,), mesh_dim_names=("tp",))


def _real(case: TrainingCase, ctx: CheckContext, comparison: Comparison, args: tuple[Any, ...]) -> Any:
    return _judged(comparison, case, mesh_of(ctx), args)


def _simulated(case: TrainingCase, ctx: CheckContext, comparison: Comparison, args: tuple[Any, ...]) -> Any:
    from pytest_gputrain.tensor_parallel.simulated import SimulationError, simulated

    try:
        with simulated(ctx.world_size) as mesh:
            return _judged(comparison, case, mesh, args)
    except SimulationError as error:
        raise CheckSkipped(str(error)) from None
    except CheckOutcome:
        raise
    except Exception as error:
        # Real ranks would tell a broken model from one that only the simulation does not bear.
        what = f"{type(error).__name__}: {error!s:.200}"
        raise CheckSkipped(f"cannot be simulated ({what}); use real ranks") from None


def _judged(comparison: Comparison, case: TrainingCase, mesh: Any, args: tuple[Any, ...]) -> Any:
    from pytest_gputrain.tensor_parallel.golden_model import ComparisonError

    try:
        return comparison(case, mesh, *args)
    except ComparisonError as error:
        raise CheckFailed(str(error)) from None
