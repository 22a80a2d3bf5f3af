"""From a check to ranks and back: every body of a check runs in a launch, of one rank or of many.

So a model that hangs, crashes the interpreter or fills the memory ends one launch and not the session,
and the process that runs the checks needs no torch.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pytest_gputrain.case import TrainingCase
from pytest_gputrain.checks.context import SESSION_LAUNCHER, SHARED_GPU, CheckContext
from pytest_gputrain.checks.result import CheckFailed, CheckOutcome, CheckSkipped, CheckUndecided

if TYPE_CHECKING:
    from pytest_gputrain.launch.result import LaunchResult

RankBody = Callable[..., Any]
_CHECKS_FOLDER = str(Path(__file__).resolve().parent)
_TRACE_FOLDER = str(Path(__file__).resolve().parent.parent / "trace")
_GOLDEN = str(Path(__file__).resolve().parent.parent / "tensor_parallel" / "golden_")
# Names the parameters in "Expected to have finished reduction" (DETAIL crashes on gloo).
_ENVIRON = {"TORCH_DISTRIBUTED_DEBUG": "INFO"}
_WITHOUT_GRADIENT = re.compile(r"Parameters which did not receive grad for rank (\d+): (.+)")
_PROGRESS = "[gputrain] step "
# Where a rank waits in a comparison of its check, which the user never wrote.
_COMPARISON = "this check's comparison of the ranks, after its step"
_CALL = r"\w+ #\d+(?: of group \S+)?(?: \([^)]*\))?"
_COMPARES = re.compile(_CALL + r" at \S*checks/peers\.py:\d+ in \w+")
_AT_PEERS = re.compile(r" +at \S*checks/peers\.py:\d+ in \w+")
_WAITS_THERE = re.compile("in " + _CALL + r" +\S*checks/peers\.py:\d+ in \w+.*")
_LIKELY_IN_STEP = (
    "  likely: in this step some ranks do what others do not: a parameter got no gradient on some (DDP waits "
    "for it, unless find_unused_parameters=True), or a collective is called on some"
)
_LAST_FRAME = re.compile(r'^  File "(.+?)", line \d+, in (\S+)', re.MULTILINE)


@dataclass(frozen=True)
class Ended:
    """A body that ended with a CheckOutcome, as it travels back from its rank."""

    outcome: CheckOutcome


def on_ranks(
    body: RankBody,
    case: TrainingCase,
    ctx: CheckContext,
    *args: Any,
    world_size: int,
    doing: str,
    env: Mapping[str, str] | None = None,
) -> list[Any]:
    """``body(case, ctx, *args)`` on every rank; returns the values by rank.

    doing: what the ranks do, for the message; env: variables of theirs. Raises CheckFailed when the launch
    comes to anything but PASSED, its cause first; CheckUndecided when the check's own code raised; whatever a
    body raised of CheckOutcome.
    """
    launcher = _launcher(ctx)
    _require_gpus(ctx, world_size, launcher.defaults.share_gpu)
    result = launcher(
        _enter,
        body,
        case,
        ctx.for_ranks(),
        args,
        world_size=world_size,
        device=ctx.device,
        timeout=ctx.timeout,
        env={**_ENVIRON, **(env or {})},
        check=False,
    )
    if result.shared_gpu:
        SHARED_GPU.set(result.shared_gpu)
    _raise_for(result, doing, keeps_artifacts=launcher.defaults.artifacts is not None)
    for value in result.values:
        if isinstance(value, Ended):
            raise value.outcome
    return list(result.values)


def alone(body: RankBody, case: TrainingCase, ctx: CheckContext, *args: Any, doing: str) -> Any:
    """``body(case, ctx, *args)`` in one process of its own; returns its value. Raises as ``on_ranks``."""
    return on_ranks(body, case, ctx, *args, world_size=1, doing=doing)[0]


def _require_gpus(ctx: CheckContext, world_size: int, share_gpu: bool) -> None:
    if ctx.device != "cuda":
        return
    from pytest_gputrain.devices.sharing import lacking

    if lack := lacking(world_size, share_gpu=share_gpu):
        raise CheckSkipped(lack)


def _launcher(ctx: CheckContext) -> Any:
    if (launcher := ctx.launcher or SESSION_LAUNCHER.get()) is not None:
        return launcher
    from pytest_gputrain.launch import Launcher

    return Launcher()


def _enter(body: RankBody, case: TrainingCase, ctx: CheckContext, args: tuple[Any, ...]) -> Any:
    """What a rank runs."""
    try:
        with same_arithmetic():
            return body(case, ctx, *args)
    except CheckOutcome as outcome:
        return Ended(outcome)


@contextlib.contextmanager
def same_arithmetic() -> Iterator[None]:
    """One thread in every rank: a sum's rounding depends on how many threads share it."""
    import torch

    torch.set_num_threads(max(1, int(os.environ.get("OMP_NUM_THREADS", "1"))))
    yield


def mark_progress(step: int) -> None:
    """Say, on the rank's output, which step begins: read again if the launch does not pass."""
    print(f"{_PROGRESS}{step}", flush=True)


def _raise_for(result: LaunchResult, doing: str, *, keeps_artifacts: bool) -> None:
    from pytest_gputrain.launch import Verdict

    if result.verdict is Verdict.PASSED:
        return
    if result.verdict is Verdict.SKIPPED:
        raise CheckSkipped(str(result.cause))
    text = result.summary()
    if not keeps_artifacts:  # a temporary folder, gone with the result
        text = "\n".join(line for line in text.splitlines() if not line.startswith("  artifacts:"))
    blamed = next((r for r in result.ranks if r.error and not r.error.is_victim and _is_ours(r.error)), None)
    if blamed is not None and blamed.error is not None:
        raise CheckUndecided(f"the check itself failed while {doing}: {blamed.error.headline}\n{text}")
    first, _, rest = text.partition("\n")
    if result.verdict is Verdict.FAILED:  # "raised" says it; HUNG, CRASHED and TIMED_OUT need their word
        first = str(result.cause)
    context = f"  while {doing}{_reached(result)}"
    text = "\n".join([first, *_without_gradient(result), context, rest])
    raise CheckFailed(in_users_words(text), {"verdict": result.verdict.value})


def in_users_words(text: str) -> str:
    """A hang's text without the collectives in which a check compares its ranks: no user wrote them."""
    first, _, rest = text.partition("\n")
    if _COMPARES.search(first) is None:
        return text
    lines = [_AT_PEERS.sub("", _COMPARES.sub(_COMPARISON, first))]
    for line in rest.splitlines():
        if line.startswith("  likely: "):
            line = _LIKELY_IN_STEP
        lines.append(_WAITS_THERE.sub(f"in {_COMPARISON}", line))
    return "\n".join(lines)


def _reached(result: LaunchResult) -> str:
    """ ", in step 3 (rank 0), step 2 (rank 1)" where the body marked its progress."""
    steps = [rank.stdout.rpartition(_PROGRESS)[2].partition("\n")[0] for rank in result.ranks]
    marked = [_PROGRESS in rank.stdout for rank in result.ranks]
    if not any(marked):
        return ""
    if len(set(steps)) == 1:
        return f", in step {steps[0]}"
    return ", in " + ", ".join(f"step {step} (rank {number})" for number, step in enumerate(steps))


def _without_gradient(result: LaunchResult) -> list[str]:
    """The parameters that DistributedDataParallel waited for in vain, in its own words."""
    messages = " ".join(rank.error.message for rank in result.ranks if rank.error)
    found = dict(_WITHOUT_GRADIENT.findall(messages))
    return [f"  no gradient on rank {rank} for: {names.strip()}" for rank, names in sorted(found.items())]


def _is_ours(error: Any) -> bool:
    """Whether the exception was raised by a check's own line, not by the user's code or torch's."""
    frames = _LAST_FRAME.findall(error.traceback)
    if not frames:
        return False
    file, function = frames[-1]
    # Every torch function that the user's code calls passes through a comparison's mode.
    passing = function in ("__torch_function__", "__torch_dispatch__")
    return file.startswith((_CHECKS_FOLDER, _TRACE_FOLDER, _GOLDEN)) and not passing
