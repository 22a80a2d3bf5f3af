"""Does training hold at the batch size that is found? Longer and more varied than a finder's tries.

The finder may use 85 % of the memory, as by default, and training all of it. Before that, whether memory
grows from step to step: then no size holds, and what keeps the tensors is named. Last the same steps on every
rank, not wrapped.

Does not see the buckets of data parallel, a stream that gives ranks other lengths, and, on CPU, memory that
an allocator cannot join (fragmentation): there every freed byte is free again.
"""

from __future__ import annotations

from dataclasses import dataclass

from pytest_gputrain.case import TrainingCase
from pytest_gputrain.case.loading import describe
from pytest_gputrain.checks.batch_finders import ask, name_of
from pytest_gputrain.checks.batch_found import scene_of
from pytest_gputrain.checks.batch_runs import quick_collection, run
from pytest_gputrain.checks.batch_scene import Scene
from pytest_gputrain.checks.batch_training import TRIED, Held, accumulating, plan, steps, train
from pytest_gputrain.checks.context import CheckContext
from pytest_gputrain.checks.ranks import alone, on_ranks
from pytest_gputrain.checks.registry import check
from pytest_gputrain.checks.result import CheckFailed, Figures
from pytest_gputrain.devices.sharing import lacking
from pytest_gputrain.values import format_size

MARGIN = 0.85  # find_batch's default


@check("batch_size_holds", subject="batch size")
def check_batch_size_holds(case: TrainingCase, ctx: CheckContext) -> Figures:
    """Fails when memory runs out at the size found, or grows from step to step."""
    scene = scene_of(case, ctx)
    doing = f"looking for the batch size ({name_of(ctx.finder)}) and training at it"
    _judge_growth(scene)
    outcome: _Outcome = alone(_find_and_train, case, ctx, scene, doing=doing)
    figures: Figures = {
        "batch size": outcome.size,
        "memory": format_size(_memory(scene)),
        "peak": format_size(max((held.peak for held in outcome.held), default=0)),
        "steps": sum(held.steps for held in outcome.held),
    }
    if outcome.error:
        raise CheckFailed(f"the finder raised instead of giving a batch size: {outcome.error}", figures)
    if not scene.minimum <= outcome.size <= scene.maximum:
        raise CheckFailed(
            f"no batch size to train at: the finder gives {outcome.size}, and {scene.answer} fits "
            f"({format_size(scene.budget)})",
            figures,
        )
    for size, held in zip((outcome.size, outcome.accumulated_size), outcome.held, strict=False):
        _judge_held(size, held, scene, figures)
    _judge_ranks(case, ctx, scene, outcome.size, figures)
    return figures


@dataclass
class _Outcome:
    """Sizes found without and with a global batch; held: training at them. error: what the finder raised."""

    error: str = ""
    size: int = 0
    accumulated_size: int = 0
    held: tuple[Held, ...] = ()


def _memory(scene: Scene) -> int:
    return int(scene.budget / MARGIN)


def _find_and_train(case: TrainingCase, ctx: CheckContext, scene: Scene) -> _Outcome:
    """In the rank."""
    run(case, ctx, scene.minimum, evaluating=scene.evaluates)  # once, for what is imported late
    with quick_collection():
        outcome = _Outcome()
        try:
            outcome.size = _found(case, ctx, scene, None)
            if scene.global_batch:
                outcome.accumulated_size = _found(case, ctx, scene, scene.global_batch)
        except Exception as error:
            outcome.error = describe(error)
            return outcome
        if outcome.size > 0:
            pieces = list(plan(case, ctx, outcome.size, scene))
            outcome.held = (train(case, ctx, pieces, _memory(scene)),)
        if outcome.accumulated_size > 0:
            # Two: one that lies beside the other's gradients. A step may also hold all of them at once, as it
            # likes.
            number = min(2, scene.global_batch // outcome.accumulated_size)
            pieces = list(accumulating(case, ctx, outcome.accumulated_size, number))
            outcome.held = (*outcome.held, train(case, ctx, pieces, _memory(scene)))
        return outcome


def _found(case: TrainingCase, ctx: CheckContext, scene: Scene, global_batch: int | None) -> int:
    from pytest_gputrain.checks.session import build_alone

    model = build_alone(case, ctx)
    return ask(
        ctx.finder,
        case,
        model=model,
        optimizer=case.optimizer(model),
        device=ctx.device,
        capacity=scene.budget,
        min_batch_size=scene.minimum,
        max_batch_size=scene.maximum,
        global_batch_size=global_batch,
        evaluates=scene.evaluates,
    )


def _judge_ranks(case: TrainingCase, ctx: CheckContext, scene: Scene, size: int, figures: Figures) -> None:
    """On every rank by itself, where there are as many: one may get more than rank 0."""
    if ctx.world_size == 1 or (ctx.device == "cuda" and lacking(ctx.world_size, share_gpu=False)):
        return
    by_rank: list[Held] = on_ranks(
        _train_on_a_rank,
        case,
        ctx,
        scene,
        size,
        world_size=ctx.world_size,
        doing=f"training at batch size {size}, each rank by itself",
    )
    for rank, held in enumerate(by_rank):
        if held.ran_out:
            raise CheckFailed(
                f"at the batch size found, {size}, memory runs out on rank {rank} in {held.ran_out}; one "
                "process alone has enough\n"
                "  likely: this rank gets longer samples, or keeps more, than the one that looked; look on "
                "all ranks and take the least (discover_batch_size does)\n"
                f"  {held.details}",
                figures,
            )
    figures["ranks"] = ctx.world_size


def _train_on_a_rank(case: TrainingCase, ctx: CheckContext, scene: Scene, size: int) -> Held:
    return train(case, ctx, list(steps(case, ctx, size, scene, TRIED)), _memory(scene))


def _judge_growth(scene: Scene) -> None:
    growth = scene.growth
    if not growth.per_step:
        return
    first, *others = growth.holders or ("what keeps it was not found",)
    kept = "".join(f"\n  and {line}" for line in others)
    raise CheckFailed(
        f"memory grows by {format_size(growth.per_step)} from step to step, so that no batch size holds: "
        f"{first}, after {growth.steps} steps{kept}\n"
        "  likely: tensors of past steps are kept, and with each the graph behind it; keep numbers "
        "(.item()) or "
        ".detach().cpu(), or clear what collects them",
        {"bytes a step": growth.per_step, "steps": growth.steps},
    )


def _judge_held(size: int, held: Held, scene: Scene, figures: Figures) -> None:
    if held.ran_out:
        raise CheckFailed(
            f"at the batch size found, {size}, memory runs out in {held.ran_out}\n"
            f"  likely: {held.likely}\n"
            f"  {held.details}\n"
            f"  the finder was given {format_size(scene.budget)}, {MARGIN:.0%} of it",
            figures,
        )
