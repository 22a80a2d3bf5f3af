"""Is there tensor parallelism at all, and is what is compared worth comparing?

A model that is the original in disguise passes every golden comparison, and ranks that have drifted apart
pass those of one rank.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from pytest_gputrain.case import TrainingCase
from pytest_gputrain.tensor_parallel.golden_account import accounting_of
from pytest_gputrain.tensor_parallel.golden_communication import silent_layers
from pytest_gputrain.tensor_parallel.golden_dropout import random_findings
from pytest_gputrain.tensor_parallel.golden_model import SEED, parameters_of
from pytest_gputrain.tensor_parallel.golden_pair import Pair
from pytest_gputrain.tensor_parallel.golden_perturb import unused_shards
from pytest_gputrain.tensor_parallel.golden_step import compare_step, take
from pytest_gputrain.tensor_parallel.records import Finding
from pytest_gputrain.tensor_parallel.records_memory import Accounting
from pytest_gputrain.trace.digest import tensor_digest

STEPS = 2
CLIPS = 1e4


def vacuity(case: TrainingCase, mesh: Any, *, seed: int = SEED) -> list[Finding]:
    """Run on every rank of ``mesh``; the same findings on all. Those with ``fails`` False are only notes.

    Covers: nothing sharded, or not to 1/N; shards that change nothing; layers that never communicate;
    replicated parameters and gradients that differ between ranks, at once or after optimizer steps; tied
    weights that drift apart; dropout; clipping by another norm than the global one.
    """
    pair = Pair(case, mesh, seed=seed)
    batch = pair.reference_batch()
    pair.parallelize()
    findings = [Finding("not_comparable", "", pair.problem)] if pair.problem else []
    findings += [
        Finding("weights", record.name, record.problem) for record in pair.weights.records if record.problem
    ]
    findings += _ratio(accounting_of(pair))
    findings += unused_shards(pair, batch)
    findings += silent_layers(pair, batch)
    findings += random_findings(pair, batch)
    # From here on weights move: first those of both models, then only the parallel one's.
    if case.has_own_step:
        record = compare_step(pair, batch, CLIPS)
        findings += [Finding("clipping", "", record.problem)] if record and record.problem else []
    findings += replica_findings(pair, batch)
    findings += _after_steps(pair, batch)
    return findings


def _ratio(accounts: Accounting) -> list[Finding]:
    """Of what is sharded, each rank has about 1/N; judged by the whole, since single ones may be uneven."""
    cut, size = accounts.sharded, accounts.world_size // accounts.sharded.copies
    if not cut.total:
        return [Finding("not_parallel", "", accounts.problem or "nothing is sharded")]
    ratios = [local / cut.total for local in cut.local]
    if max(ratios) <= 1.5 / size:
        return []
    return [
        Finding(
            "ratio",
            "",
            f"rank {ratios.index(max(ratios))} holds {max(ratios):.0%} of the sharded parameters, "
            f"about {1 / size:.0%} is 1/{size}",
            {"ratio": max(ratios)},
        )
    ]


def replica_findings(pair: Pair, batch: Any) -> list[Finding]:
    """Replicated gradients, bit by bit; a step of the case's own may still be to make them so. Collective.

    Only noted where a rank's own gradients change from one backward to the next (atomic additions on a GPU).
    """
    differing = _differing(pair, _gradients(pair, batch))
    if not differing:
        return []
    fails = _repeats(pair, batch)
    if fails and pair.case.has_own_step:
        with pair.world.acting():
            differing = _differing(pair, take(pair.case, pair.parallel, batch, pair.seed))
    what = f"is replicated, but its gradient is not bit by bit the same on all {pair.world.size} ranks"
    return [replace(one, fails=fails) for one in _several("gradients_differ", differing, what)]


def _gradients(pair: Pair, batch: Any) -> dict[str, Any]:
    """Of the parallel model, by one backward."""
    pair.parallel.zero_grad(set_to_none=True)
    pair.ask_parallel(batch, gradients=True)
    return {n: p.grad for n, p in parameters_of(pair.parallel).items() if p.grad is not None}


def _repeats(pair: Pair, batch: Any) -> bool:
    """Whether each rank has the same gradients in a second backward; collective."""
    both: list[dict[int, list[str]]] = []
    for _ in range(2):
        found = [pair.world.pieces(one) for one in _gradients(pair, batch).values()]
        both.append({r: [tensor_digest(one[r]) for one in found if r in one] for r in pair.world.held})
    return all(pair.world.merged({r: both[0][r] == both[1][r] for r in pair.world.held}))


def _several(kind: str, names: list[str], what: str) -> list[Finding]:
    """One finding for all of them, by the first."""
    if not names:
        return []
    more = f" (and {len(names) - 1} more)" if len(names) > 1 else ""
    return [Finding(kind, names[0], f"{names[0]} {what}{more}", {"parameters": len(names)})]


def _differing(pair: Pair, tensors: dict[str, Any]) -> list[str]:
    """Names of what should be equal on all ranks and is not; collective."""
    names = [name for name in parameters_of(pair.parallel) if pair.weights.is_replicated(name)]
    present = tuple(name for name in names if name in tensors)
    common = pair.world.merged(dict.fromkeys(pair.world.held, present))
    names = [name for name in names if all(name in one for one in common)]
    digests: dict[int, list[str]] = {rank: [] for rank in pair.world.held}
    for name in names:
        for rank, piece in pair.world.whole(tensors[name]).items():
            digests[rank].append(tensor_digest(piece))
    by_rank = pair.world.merged(digests)
    return [name for index, name in enumerate(names) if len({one[index] for one in by_rank}) > 1]


def _after_steps(pair: Pair, batch: Any) -> list[Finding]:
    """Replicated parameters and tied weights after a few steps of the case's own loop; collective."""
    for _ in range(STEPS):
        with pair.world.acting():
            take(pair.case, pair.parallel, batch, pair.seed)
    differing = _differing(pair, {n: p.detach() for n, p in parameters_of(pair.parallel).items()})
    what = f"is replicated, but after {STEPS} steps not the same on all {pair.world.size} ranks"
    return _several("parameters_differ", differing, what) + untied_findings(pair, STEPS)


def untied_findings(pair: Pair, steps: int) -> list[Finding]:
    """Parameters that were one before parallelize, and are not equal after so many steps; collective."""
    findings = []
    parameters = parameters_of(pair.parallel)
    for first, holders in pair.weights.untied.items():
        wholes = [pair.world.whole(parameters[holder]) for holder in holders]
        same = {
            rank: all(
                one[rank].shape == wholes[0][rank].shape and torch.equal(one[rank], wholes[0][rank])
                for one in wholes
            )
            for rank in pair.world.held
        }
        if not all(pair.world.merged(same)):
            names = " and ".join(pair.weights.tied[first])
            findings.append(
                Finding(
                    "untied",
                    first,
                    f"{names} are one parameter before parallelize and two after it, which differ after "
                    f"{steps} steps: tie them again",
                )
            )
    return findings
