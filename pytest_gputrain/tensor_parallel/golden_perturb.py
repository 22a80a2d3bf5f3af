"""Does each rank's shard matter? Change it, and look whether every rank's output changes."""

from __future__ import annotations

import re
from functools import partial
from typing import Any

import torch

from pytest_gputrain.tensor_parallel import golden_difference as apart
from pytest_gputrain.tensor_parallel.golden_gather import groups
from pytest_gputrain.tensor_parallel.golden_gradients import parts
from pytest_gputrain.tensor_parallel.golden_model import parameters_of
from pytest_gputrain.tensor_parallel.golden_pair import Pair
from pytest_gputrain.tensor_parallel.records import Finding

MOST_SINGLE = 12  # parameters changed alone, one of each kind: that of block 0 stands for all blocks
AMOUNT = 0.5  # of a shard's own size


def unused_shards(pair: Pair, batch: Any) -> list[Finding]:
    """Every rank's shards together, then single ones on the last rank; collective."""
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
    for name in _one_of_each(pair, batch, sharded, last):
        if not _matters(pair, batch, before, [name], last, anywhere=True):
            findings.append(
                Finding(
                    "unused", name, f"changing rank {last}'s part of {name} changes no output: it is not used"
                )
            )
    return findings


def _one_of_each(pair: Pair, batch: Any, names: list[str], rank: int) -> list[str]:
    """Weights whose golden gradient says that they matter; biases may cancel (a key's, before a softmax)."""
    with pair.world.alone():
        pair.reference.zero_grad(set_to_none=True)
        pair.ask_reference(batch, gradients=True)
    parameters = parameters_of(pair.reference)
    kinds: dict[str, str] = {}
    for name in names:
        parameter = parameters[name]
        if parameter.dim() < 2 or parameter.grad is None:
            continue
        kinds.setdefault(re.sub(r"\d+", "#", name), name)
    useful = {}
    for r in pair.world.held:
        held = {n: torch.empty(by_rank[r].whole_shape) for n, by_rank in pair.weights.held.items()}
        touched = partial(_touched, pair, held, rank)
        useful[r] = [name for name in kinds.values() if touched(name, parameters[name].grad)]
    pair.reference.zero_grad(set_to_none=True)
    return pair.world.merged(useful)[0][:MOST_SINGLE]


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
        piece = pair.world.pieces(parameters[holder]).get(rank)
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
    # Beside data parallelism it is the ranks along one dimension of the mesh that work together.
    return any(all(by_rank[r] for r in group) for group in groups(pair.mesh, rank) if len(group) > 1)
