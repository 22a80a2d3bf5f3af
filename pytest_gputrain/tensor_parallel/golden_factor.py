"""Gradients that are all the right ones times one number: what clipping by a wrong norm makes of them.

One that is a number for each rank tells of a norm of each rank's own; one that is the same everywhere, of a
norm that counts too much or too little.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from statistics import median

import torch

from pytest_gputrain.tensor_parallel import golden_difference as apart
from pytest_gputrain.tensor_parallel.records_backward import GradientRecord

SAME = 1e-2  # what factors of parameters, and what is left of a difference, may differ by
ALMOST_ALL = 0.9
LEAST = 2  # parameters: of one alone a factor says nothing about a norm of all

WAY_OUT = (
    "use torch's clip_grad_norm_ over DTensors, or sum the squared norms over the tensor-parallel ranks, "
    "replicated parameters counted once"
)


def factor(pieces: Iterable[tuple[torch.Tensor, torch.Tensor]]) -> float | None:
    """k where everything found is k times what is wanted, of one rank's (wanted, found); None elsewhere."""
    dot, size, found = 0.0, 0.0, 0.0
    for wanted, got in pieces:
        one = wanted.flatten().float()
        other = got.detach().to(wanted.device).flatten().float()
        dot += float(one @ other)
        size += apart.norm(one) ** 2
        found += apart.norm(other) ** 2
    if not size or not found:
        return None
    return dot / size if 1 - dot * dot / (size * found) <= SAME * SAME else None


def common(records: Sequence[GradientRecord]) -> tuple[float, ...] | None:
    """By rank, the factor that almost all gradients are wrong by; None where there is none.

    A DTensor's parts come gathered, each with its own rank's factor: nothing is known of those.
    """
    counted = [record for record in records if not record.negligible]
    wrong = [record for record in counted if record.problem]
    known = [record for record in wrong if record.factors and None not in record.factors]
    unknown = [record for record in wrong if record not in known and record.kind == "replicated"]
    if len(wrong) < ALMOST_ALL * len(counted) or len(known) < LEAST or len(unknown) > len(known) / 10:
        return None
    by_rank = [
        [one for one in each if one is not None] for each in zip(*(r.factors for r in known), strict=True)
    ]
    middle = tuple(median(of_rank) for of_rank in by_rank)
    alike = sum(
        all(
            abs(one - k) <= SAME * abs(k)
            for one, k in zip(record.factors, middle, strict=True)
            if one is not None
        )
        for record in known
    )
    return middle if alike >= ALMOST_ALL * len(known) else None


def clipped_by(records: Sequence[GradientRecord]) -> str | None:
    """What norm the factors tell of, and the way out; None where they tell of none."""
    factors = common(records)
    if factors is None:
        return None
    size = len(factors)
    if max(factors) - min(factors) > SAME * SAME * max(factors):
        by_rank = ", ".join(f"{one:.4g} on rank {rank}" for rank, one in enumerate(factors))
        return (
            f"almost all are the right ones times {by_rank}; likely each rank clips by the norm of its own "
            f"part: {WAY_OUT}"
        )
    # Summed over the ranks once too often, or divided by them: not a norm's doing.
    if any(abs(factors[0] - whole) <= SAME * whole for whole in (size, 1 / size, 1.0)):
        return None
    norm = (
        "counts replicated parameters once for each rank"
        if factors[0] < 1
        else "leaves out what other ranks hold"
    )
    return (
        f"almost all are {factors[0]:.4g} times the right ones on every rank; likely the norm that they are "
        f"clipped by {norm}: {WAY_OUT}"
    )
