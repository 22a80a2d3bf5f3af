"""What is said of a step that ends a stability run: not finite, ranks that diverge, other data."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pytest_gputrain.checks.peers import Peers
from pytest_gputrain.checks.stable_watch import ALL_EVERY, sampled
from pytest_gputrain.endurance.findings import Finding, on, only
from pytest_gputrain.endurance.records import StepRecord

_NAMED = 3  # parameters, in a message
_KEPT = 20  # of them, in the figures


def not_finite_step(
    record: StepRecord, ranks: list[int], world_size: int, names: list[str], parameters: int, *, masked: bool
) -> Finding:
    """ranks: on which it went wrong in the same way; names: of parameters that are not finite, of so many.

    masked: whether no target of the step's batch counts.
    """
    where = on(ranks, world_size)
    if not record.finite["loss"]:
        what = f"the loss is {record.loss} in step {record.step} {where}"
    else:
        of = f"{len(names)} of {parameters} parameters"
        what = f"{of} are NaN or infinite after step {record.step} {where}"
    if masked:
        what += "; every target of its batch is -100, which the loss leaves out: leave such a batch out, or "
        what += "divide by no less than 1"
    else:
        what += "; look at this step's batch and the learning rate, or keep such a step from the optimizer"
    lines = [what]
    if names:
        more = f" and {len(names) - _NAMED} more" if names[_NAMED:] else ""
        lines.append(f"  not finite: {', '.join(names[:_NAMED])}{more}")
    if record.grad_norm is not None:
        lines.append(f"  norm of the gradients in that step: {record.grad_norm:.4g}")
    if not masked:
        lines.append(
            "  likely: a mean over no samples (every target masked), a division, root or logarithm of zero, "
            "an overflow, a learning rate that is too high, or weights that an earlier step spoilt"
        )
    figures = {"parameters": names[:_KEPT], "loss": not record.finite["loss"]}
    return Finding("not_finite", record.step, only(ranks), "\n".join(lines), figures)


def diverged(record: StepRecord, deviating: list[int], parameters: dict[str, Any], peers: Peers) -> Finding:
    """A collective: names the parameters, of those that all ranks have to hold the same."""
    from pytest_gputrain.trace.digest import tensor_digest

    by_name = peers.deviating([tensor_digest(one) for one in parameters.values()])
    names = [name for name, ranks in zip(parameters, by_name, strict=True) if ranks]
    others = _those(deviating)
    step = record.step
    # What shows only where all elements of all parameters are looked at began since that was done last.
    is_sampled = bool(peers.deviating([sampled(record.digest or "")])[0])
    since = f"step {step}" if is_sampled else f"one of steps {max(1, step - ALL_EVERY + 1)} to {step}"
    message = (
        f"ranks diverge in {since}: {others} hold different weights after it ({len(names)} of "
        f"{len(parameters)} parameters: {', '.join(names[:_NAMED])}); let every rank step with the same, "
        "averaged gradients\n"
        "  likely: gradients changed after they were averaged (clipped by a rank's own norm, scaled, "
        "noised), a step that one rank left out, no_sync without a step that "
        "synchronises, or random weights"
    )
    return Finding("divergence", step, deviating[0], message, {"parameters": names[:_KEPT]})


def frozen_differ(step: int, differing: Mapping[str, list[int]], frozen: Mapping[str, Any]) -> Finding:
    """differing: by name, the ranks that hold something else than rank 0; step: 0 for before the first."""
    names, ranks = [*differing], sorted({rank for those in differing.values() for rank in those})
    thawed = [name for name in names if frozen[name].requires_grad]
    what = "parameter" if thawed else "frozen parameter"
    if not step:
        when = "before the first step"
    elif step % ALL_EVERY:
        when = f"after {step} steps"
    else:
        when = f"since one of steps {step - ALL_EVERY + 1} to {step}"
    advice = "let every rank build, load and change it in the same way"
    likely = (
        "drawn, loaded or changed on a rank after the model was wrapped, which sends weights once, or "
        "averaged weights that one rank alone keeps up"
    )
    if thawed:
        advice = "wrap the model again after unfreezing"
        likely = "it was frozen when the model was wrapped, so its gradients are not averaged"
    message = (
        f"{what} {names[0]} differs between ranks {when}: {_those(ranks)} hold different values "
        f"({len(names)} of {len(frozen)} that were frozen: {', '.join(names[:_NAMED])}); {advice}\n"
        f"  likely: {likely}"
    )
    return Finding("divergence", step, ranks[0], message, {"parameters": names[:_KEPT]})


def constants_differ(steps: int, differing: Mapping[str, list[int]]) -> Finding:
    """Of buffers that have been as they are since before the first step."""
    names, ranks = [*differing], sorted({rank for those in differing.values() for rank in those})
    message = (
        f"buffer {names[0]} differs between ranks and none of {steps} steps changed it: {_those(ranks)} "
        f"compute with different constants ({len(names)} such buffers: {', '.join(names[:_NAMED])}); give "
        "every rank the same, or broadcast it from rank 0\n"
        "  likely: drawn from a seed of the rank's own, or made from the rank's own data; "
        "DistributedDataParallel sends buffers when it wraps and, unless broadcast_buffers=False, before a "
        "forward; FSDP never does"
    )
    return Finding("divergence", steps, ranks[0], message, {"buffers": names[:_KEPT]})


def statistics_differ(moved: Mapping[str, list[int]], world_size: int) -> list[str]:
    """A note on buffers that differ; moved: by name, the ranks whose steps changed them."""
    if not moved:
        return []
    name, ranks = next(iter(moved.items()))
    more = f" and {len(moved) - 1} more" if len(moved) > 1 else ""
    if len(ranks) < world_size:
        who = f"is changed by the steps of rank {', '.join(map(str, ranks))} only"
    else:
        who = "follows each rank's own batches"
    return [f"buffer {name}{more} {who}: ranks hold different values, and a checkpoint takes one rank's"]


def _those(ranks: list[int]) -> str:
    named = ", ".join(map(str, ranks))
    return f"rank {named} and rank 0" if len(ranks) == 1 else f"ranks {named} and rank 0"


def ill_buffers(names: list[str], steps: int, ranks: list[int], world_size: int) -> Finding:
    """names: of buffers that are not finite, and were in the beginning."""
    more = f" and {len(names) - 1} more" if names[1:] else ""
    message = (
        f"buffer {names[0]}{more} is NaN or infinite {on(ranks, world_size)} after {steps} steps, which "
        "evaluation and the checkpoint will take; look at what updates it, and for a NaN or a huge value in "
        "a batch"
    )
    return Finding("not_finite", steps, only(ranks), message, {"buffers": names[:_KEPT]})


def ill_state(names: list[str], steps: int, ranks: list[int], world_size: int) -> Finding:
    """names: of what optimizers keep that is not finite."""
    more = f" and {len(names) - 1} more" if names[1:] else ""
    message = (
        f"the optimizer's {names[0]}{more} is NaN or infinite {on(ranks, world_size)} after {steps} steps: "
        "these elements are not trained any more, or become NaN; look for a gradient that overflowed once, "
        "and clip gradients or leave such a step out"
    )
    return Finding("not_finite", steps, only(ranks), message, {"state": names[:_KEPT]})


def other_data(step: int, rank: int) -> Finding:
    """Of a run that resumed, or of one whose stream is drawn again."""
    message = (
        f"resumed with another order of data: the batch of step {step} on rank {rank} is "
        "not the one that the run recorded; let batches() give the same order again for the same "
        "seed, from torch's generator or one of its own that it seeds\n"
        "  likely: a shuffle seeded by time or by a process's id, files listed in another order, or "
        "data that changed"
    )
    return Finding("data_order", step, rank, message)
