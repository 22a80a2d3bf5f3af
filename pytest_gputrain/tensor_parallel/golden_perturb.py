"""Does each rank's shard matter? Change it, and look whether every rank's output changes."""

from __future__ import annotations

import re
from functools import partial
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from pytest_gputrain.case import pytree
from pytest_gputrain.tensor_parallel import golden_difference as apart
from pytest_gputrain.tensor_parallel.golden_gather import groups
from pytest_gputrain.tensor_parallel.golden_model import address_of, parameters_of
from pytest_gputrain.tensor_parallel.golden_pair import Pair
from pytest_gputrain.tensor_parallel.golden_pieces import parts
from pytest_gputrain.tensor_parallel.golden_world import is_dtensor_class
from pytest_gputrain.tensor_parallel.records import Finding

MOST_SINGLE = 12  # parameters changed alone, one of each kind: that of block 0 stands for all blocks
AMOUNT = 0.5  # of a shard's own size


def unused_shards(pair: Pair, batch: Any) -> list[Finding]:
    """Every rank's shards together; then, on the last rank, one of each kind, and any that nothing reads.
    Collective.
    """
    sharded = [
        record.name for record in pair.weights.records if record.kind != "replicated" and record.held_as
    ]
    if not sharded:
        return []
    before = _outputs(pair, batch)
    findings = []
    for rank in range(pair.world.size):
        if not _matters(pair, batch, before, sharded, rank):
            findings.append(
                Finding(
                    "unused",
                    "",
                    f"changing all of rank {rank}'s shards changes no output: the parallel model does not "
                    "compute with them",
                )
            )
    if findings:
        return findings
    last = pair.world.size - 1
    useful = _useful(pair, batch, sharded, last)
    unread = _unread(pair, batch, useful)
    for name in dict.fromkeys([*_one_of_each(useful), *unread[:MOST_SINGLE]]):
        if not _matters(pair, batch, before, [name], last, anywhere=True):
            findings.append(
                Finding(
                    "unused", name, f"changing rank {last}'s part of {name} changes no output: it is not used"
                )
            )
    return findings


class _Reads(TorchDispatchMode):
    """The storages that operators read, those apart that only look at them in another shape."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.storages: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(is_dtensor_class(kind) for kind in types):
            return NotImplemented  # it comes again as what it is made of
        if not func.is_view:
            self.storages.update(address_of(tensor) for tensor in pytree.tensors([args, kwargs or {}]))
        return func(*args, **(kwargs or {}))


def _unread(pair: Pair, batch: Any, names: list[str]) -> list[str]:
    """Of these, the weights that no operator of a forward reads on the last rank; collective.

    A hint, to be confirmed: what runs compiled is not seen.
    """
    if pair.world.simulated:
        return []
    reads = _Reads()
    with reads:
        pair.ask_parallel(batch)
    parameters = parameters_of(pair.parallel)
    unread = [
        name
        for name in names
        if not any(
            holder in parameters and address_of(parameters[holder]) in reads.storages
            for holder in pair.weights.holders(name)
        )
    ]
    return pair.world.merged(dict.fromkeys(pair.world.held, unread))[-1]


def _one_of_each(names: list[str]) -> list[str]:
    kinds: dict[str, str] = {}
    for name in names:
        kinds.setdefault(re.sub(r"\d+", "#", name), name)
    return list(kinds.values())[:MOST_SINGLE]


def _useful(pair: Pair, batch: Any, names: list[str], rank: int) -> list[str]:
    """Weights whose golden gradient says that the rank's part of them matters, on all ranks.

    Biases may cancel (a key's, before a softmax), and are left out.
    """
    with pair.world.alone():
        pair.reference.zero_grad(set_to_none=True)
        pair.ask_reference(batch, gradients=True)
    parameters = parameters_of(pair.reference)
    useful = {}
    for r in pair.world.held:
        held = {n: torch.empty(by_rank[rank].whole_shape) for n, by_rank in pair.weights.held.items()}
        touched = partial(_touched, pair, held, rank)
        matrices = [n for n in names if parameters[n].dim() > 1 and parameters[n].grad is not None]
        useful[r] = [name for name in matrices if touched(name, parameters[name].grad)]
    pair.reference.zero_grad(set_to_none=True)
    return pair.world.merged(useful)[0]


def _touched(pair: Pair, held: dict[str, Any], rank: int, name: str, grad: Any) -> bool:
    whole = apart.norm(grad)
    pieces = parts(pair, name, grad, held, rank)
    return any(apart.norm(wanted) > 1e-3 * whole for wanted, *_ in pieces)


def _outputs(pair: Pair, batch: Any) -> dict[int, list[torch.Tensor]]:
    """By rank held, what each rank has of the model's outputs, and its loss."""
    answer = pair.ask_parallel(batch)
    found: dict[int, list[torch.Tensor]] = {rank: [] for rank in pair.world.held}
    for tensor in [*(output for _, output in answer.outputs), answer.loss]:
        for rank, piece in pair.world.whole(tensor).items():
            found[rank].append(piece.clone())
    return found


def _matters(
    pair: Pair,
    batch: Any,
    before: dict[int, list[torch.Tensor]],
    names: list[str],
    rank: int,
    *,
    anywhere: bool = False,
) -> bool:
    """Whether a change of that rank's shards changes the outputs of all its group (``anywhere``: of any)."""
    holders = [holder for name in names for holder in pair.weights.holders(name)]
    parameters = parameters_of(pair.parallel)
    kept = []
    generator = torch.Generator().manual_seed(pair.seed)
    for holder in dict.fromkeys(holders):
        mine = parameters.get(holder)  # other ranks' experts are not here
        piece = None if mine is None else pair.world.pieces(mine).get(rank)
        if piece is not None and piece.numel():
            kept.append((piece, piece.clone()))
            size = AMOUNT * float(piece.float().std(False))
            noise = torch.randn(piece.shape, generator=generator) * size
            piece.add_(noise.to(piece.device, piece.dtype))
    try:
        after = _outputs(pair, batch)
    finally:
        for piece, value in kept:
            piece.copy_(value)
    changed = {
        r: any(not torch.equal(old, new) for old, new in zip(before[r], after[r], strict=True))
        for r in before
    }
    by_rank = pair.world.merged(changed)
    if anywhere:
        return any(by_rank)
    # Beside data parallelism it is the ranks along one dimension of the mesh that work together, or as many
    # where parallelize has made a mesh of its own.
    together = any(all(by_rank[r] for r in group) for group in groups(pair.mesh, rank) if len(group) > 1)
    copies = pair.weights.copies
    return together or (copies > 1 and by_rank[rank] and sum(by_rank) * copies >= pair.world.size)
