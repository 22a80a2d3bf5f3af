"""What is usually behind a hang, by the calls of the ranks. Said as likely, since not proved. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from .deadlock import BACKWARD, Call, Scene

MISMATCH = (
    "tensors whose size or dtype differs between the ranks (a last batch that is smaller, a model built by "
    "rank); make them alike, or exchange the sizes first"
)
ROOTS = "src or dst differs between the ranks; it is a global rank, and the same one on all ranks of a group"
GROUPS = "ranks enter the collectives of two groups in opposite order; enter them in one order on all ranks"
DEADLOCK = (
    "ranks entered different collectives, or the same ones in a different order: look for a condition that "
    "differs between the ranks"
)
DIFFERENT_STEPS = "ranks ran a different number of steps, or only some of them came to this collective"
_ORDER = (
    "the ranks call the same collectives in a different order, or one of them made a call more or less (a "
    "condition that differs between ranks, a continue); call them in one order on all ranks"
)
_WAITS = {
    "new_group": "new_group (and DeviceMesh) must be called by every rank, also by those not in the group",
    "init_process_group": "every rank has to call it: check WORLD_SIZE and the conditions around it",
    "recv": "a send that is missing, or ranks that both receive first",
    "isend or irecv": "a message of which its other side never called send or recv",
    "send": "a recv that is missing, or ranks that both send first",
}


def of_order(mine: Scene, theirs: Scene, call: Call, other: Call) -> str:
    """For two calls that met under one number: ``call`` of the rank ``mine``, ``other`` of ``theirs``."""
    shared, only = _knows(theirs, call), other
    if _knows(mine, other):
        if shared:
            return _ORDER + _parting(mine.calls, theirs.calls)
        only = call
    elif not shared:
        return DEADLOCK  # neither line has been seen on the other side: it hung before it came there
    advice = (
        f"only some ranks come to {only.location} ({only.op}): a condition that differs between ranks; "
        "call it on every rank or on none"
    )
    if only is call and _knows(mine, other):  # it may also have come there too early
        advice += f"; or a rank skipped {other.location} ({other.op}) once: a continue, or fewer batches"
    return advice


def _knows(scene: Scene, call: Call) -> bool:
    """Whether a rank has come to the call's line; of one that has died, what DDP called is not known."""
    unknown = call.note is not None and not scene.complete
    return unknown or any(known.location == call.location for known in scene.calls)


def of_sizes(mine: Scene, theirs: Scene, call: Call, other: Call) -> str:
    """For one operation with other tensors: from other lines these are other calls, not other sizes."""
    if call.location == other.location:
        return MISMATCH
    advice = of_order(mine, theirs, call, other)
    return MISMATCH if advice is DEADLOCK else advice


def of_exception(ranks: str, count: int) -> str:
    """For ranks that came where they are while they handle an exception, and others that have none."""
    came = "came" if count == 1 else "come"
    return (
        f"{ranks} {came} there by an exception of which the other ranks know nothing: mend what raised it; a "
        "collective in except or finally is one that the others do not call"
    )


def is_stranger(call: Call, there: Sequence[Call], other: Call, here: Sequence[Call]) -> bool:
    """Of two calls that met under one number, whether ``call`` rather than ``other`` should not be there.

    The other side (``there``) has never come to its line, while its own (``here``) knows the other's line; or
    both lines are new to the other side, and the other call is not the user's but DDP's own.
    """
    if call.location is None or any(known.location == call.location for known in there):
        return False
    if any(known.location == other.location for known in here):
        return True
    return call.note is None and other.note is not None


def of_absence(scenes: Mapping[int, Scene], call: Call, waits: int, absent: int) -> str:
    """For a call in which ``waits`` waits and to which ``absent`` never came."""
    if call.location is None:
        return DEADLOCK
    counts = {rank: _calls_at(scenes[rank], call) for rank in (waits, absent)}
    missing = scenes[absent]
    if missing.state == "running" and missing.waits_in == BACKWARD:
        return "an operation or a hook of its backward that does not return: a lock, a file, a library's code"
    if missing.state == "running":
        return "a rank that is busy or waits outside of torch while others are already in the collective"
    if scenes[waits].complete and not missing.complete:  # what DDP called there is not known
        return DIFFERENT_STEPS
    if not counts[absent]:
        return (
            f"only some ranks come to {call.location} ({call.op}): a condition on the rank, as around "
            "logging, saving or evaluation; call it on every rank or on none"
        )
    shift = _parting(scenes[waits].calls, missing.calls)
    if counts[waits] > counts[absent]:
        numbers = ", ".join(f"rank {rank}: {number}" for rank, number in sorted(counts.items()))
        return (
            f"ranks ran a different number of steps (calls at this line: {numbers}); give every rank the "
            f"same number of batches, or use torch.distributed.algorithms.Join{shift}"
        )
    return DIFFERENT_STEPS + shift


def of_wait(function: str | None) -> str:
    """For a wait in a torch function that is no collective."""
    return _WAITS.get(function or "", DEADLOCK)


def _calls_at(scene: Scene, call: Call) -> int:
    return sum(c.location == call.location and c.op == call.op for c in scene.calls)


def _parting(mine: Sequence[Call], theirs: Sequence[Call]) -> str:
    """Where the ranks first met in one collective from different lines, though they share these lines.

    Lines that differ by design (a broadcast written once for the source and once for the others) never meet
    themselves on the other rank, and say nothing.
    """
    known = {call.key: call for call in theirs if call.seq is not None}
    pairs = [(c, known[c.key]) for c in mine if c.seq is not None and c.key in known]
    own, other = {a.location for a, _ in pairs}, {b.location for _, b in pairs}
    for a, b in pairs:
        if (
            a.location
            and b.location
            and a.location != b.location
            and (a.location in other or b.location in own)
        ):
            return f"; they parted at {a.name()}, called at {a.location} and at {b.location}"
    return ""
