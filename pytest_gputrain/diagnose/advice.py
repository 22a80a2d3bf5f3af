"""The sentences that say what to change. One function a leaf of the tree; each names what was found. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from pytest_gputrain.diagnose.records import Missing, PhaseResult

_NAMED = 5


@dataclass(frozen=True)
class Advice:
    """kind: the leaf; text: what is the matter and what to change."""

    kind: str
    text: str


def static_graph() -> Advice:
    return Advice(
        "static_graph",
        "DDP with static_graph=True passes: wrap with DistributedDataParallel(model, static_graph=True). It "
        "demands that the same parameters are used, in the same order and as often, in every step and on "
        "every rank; a model that branches on its data breaks that promise",
    )


def find_unused() -> Advice:
    return Advice(
        "find_unused",
        "DDP with find_unused_parameters=True passes and static_graph=True does not: which parameters are "
        "used changes from step to step; wrap with find_unused_parameters=True (a walk over the graph each "
        "step), or make every step use them all, if need be multiplied by zero",
    )


def branch(failed: Sequence[PhaseResult]) -> Advice:
    names = ", ".join(result.phase.branch for result in failed)
    why = failed[0].cause or f"it came to {failed[0].outcome}"
    noun, own = ("branch", "its") if len(failed) == 1 else ("branches", "their")
    return Advice(
        "branch",
        f"of the branches run alone only {noun} {names} failed ({why}): mend {own} backward, first of all "
        "custom autograd functions, collectives inside it, and in-place operations on what backward needs",
    )


def all_branches(failed: Sequence[PhaseResult]) -> Advice:
    return Advice(
        "all_branches",
        f"every branch fails alone ({failed[0].cause or failed[0].outcome}): the fault is in what they "
        "share, not in one of them; look at the cause's line before any branch",
    )


def missing(parameters: Sequence[Missing]) -> Advice:
    names = ", ".join(one.name for one in parameters[:_NAMED])
    if (more := len(parameters) - _NAMED) > 0:
        names += f" and {more} more"
    owners = ", ".join(dict.fromkeys(one.owner for one in parameters[:_NAMED]))
    return Advice(
        "missing",
        f"the same parameters got no gradient on every rank in every step: {names}. Look at {owners}: an "
        "in-place operation or detach() cuts them off, or forward never uses them; use them, or freeze them "
        "with requires_grad_(False) before DDP wraps the model",
    )


def missing_differs(parameters: Sequence[Missing]) -> Advice:
    first = parameters[0]
    return Advice(
        "missing_differs",
        f"{len(parameters)} parameters got no gradient on some ranks or in some steps only, first "
        f"{first.name} (ranks {_numbers(first.ranks)}, steps {_numbers(first.steps)}): forward branches on "
        f"rank or data in {first.owner}; take the same branch on all ranks, or wrap with "
        "find_unused_parameters=True",
    )


def on_gloo(result: PhaseResult, *, both: bool) -> Advice:
    where = "on gloo and on NCCL" if both else "on gloo"
    at = f" Start at {result.location}." if result.location else ""
    return Advice(
        "control_flow",
        f"it hangs {where}, so the transport is not to blame but autograd or control flow: ranks must enter "
        f"the same collectives in the same order.{at} Look for a collective under `if rank == 0`, an uneven "
        "number of steps, and a backward that only some ranks run",
    )


def transport(result: PhaseResult) -> Advice:
    return Advice(
        "transport",
        "it hangs on NCCL and passes on gloo: the transport is to blame. Read the NCCL INFO lines in "
        f"{result.folder or 'its folder'}/output.log, then try NCCL_P2P_DISABLE=1, NCCL_IB_DISABLE=1 and the "
        "right NCCL_SOCKET_IFNAME, one at a time; also a rank that uses another rank's GPU hangs like this",
    )


def layer(result: PhaseResult) -> Advice:
    assert result.range is not None
    start, end = result.range
    which = f"layer {start}" if end - start == 1 else f"layers {start} to {end - 1} (only together)"
    return Advice(
        "layer",
        f"with activation checkpointing {which} fails and the others do not ({result.cause}): recomputing it "
        "does not repeat its forward. Look there for random numbers outside torch's generator, state that "
        "forward changes, and in-place operations on the layer's input",
    )


def checkpointing(result: PhaseResult) -> Advice:
    return Advice(
        "checkpointing",
        f"activation checkpointing fails ({result.cause}), no smaller range of layers found: look at what "
        "all layers share, such as use_reentrant=True, random state that is not preserved, or a cache that "
        "forward fills; until then leave it off",
    )


def alone(result: PhaseResult) -> Advice:
    at = f" at {result.location}" if result.location else ""
    return Advice(
        "alone",
        f"it fails in a single process too ({result.cause or result.outcome}), so data parallelism is not to "
        f"blame: mend it{at} first, with one process and a debugger",
    )


def slow(results: Sequence[PhaseResult]) -> Advice:
    first = results[0]
    profile = first.profile or first.cause or "no profile could be taken"
    return Advice(
        "slow",
        f"no hang: ranks made progress in {first.phase.name}, only slowly. {profile}. Make that faster, or "
        "give the phases more time with --timeout",
    )


def raised(result: PhaseResult) -> Advice:
    at = f" at {result.location}" if result.location else ""
    likely = f". Likely: {result.likely}" if result.likely else ""
    return Advice(
        "own_error",
        f"mend what the cause names{at}: {result.cause or result.outcome}{likely}",
    )


def parity(result: PhaseResult) -> Advice:
    return Advice(
        "parity",
        f"gradients differ with activation checkpointing ({result.cause}): recomputation does not repeat "
        "forward; preserve the random state and change no state in forward",
    )


def fsdp2() -> Advice:
    return Advice(
        "fsdp2",
        "the model passes under FSDP2 (fully_shard) and not under DDP: the fault is in how DDP buckets and "
        "reduces it (unused or shared parameters), not in the model's arithmetic",
    )


def healthy() -> Advice:
    return Advice("healthy", "nothing to change in the program as it is: every phase that accuses passed")


def nothing_ran() -> Advice:
    return Advice("nothing_ran", "nothing ran, which proves nothing: give phases that apply, or none for all")


def interrupted() -> Advice:
    return Advice("interrupted", "the plan was interrupted: run it again to its end before believing a pass")


def _numbers(values: Sequence[int]) -> str:
    return ", ".join(map(str, values))
