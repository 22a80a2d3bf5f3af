"""Which branches a sweep has: each goes on from one checkpoint with a batch k times the base batch.

All of them see exactly the same number of tokens, so that losses compare: the tokens asked for are rounded
down to whole sequences, the same number on every rank, and the last step of a branch takes what is left. Pure
arithmetic, in sequences of ``block_size`` tokens.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial

from pytest_gputrain.batch.accumulation import AccumulationPlan, plan_accumulation
from pytest_gputrain.batch.ladder import whole

# By what the base learning rate is multiplied when the batch is k times the base batch. "sqrt" is for Adam
# and its kin (Malladi et al. 2022, "On the SDEs and Scaling Rules for Adaptive Gradient Algorithms"),
# "linear" for SGD (Goyal et al. 2017, "Accurate, Large Minibatch SGD").
LR_SCALINGS: Mapping[str, Callable[[int], float]] = {
    "sqrt": math.sqrt,
    "linear": float,
    "none": lambda k: 1.0,
}
BASE_NAME = "branches"
# Becomes a name and a group at Weights & Biases, which takes 128 characters; the branch adds its own.
_LEGAL_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


@dataclass(frozen=True, kw_only=True)
class Branch:
    """``num_steps`` optimizer steps; the last is smaller where the tokens do not come out even.

    plan: a step; last_plan: the last step, the same as ``plan`` where it is whole. Batch sizes count
    sequences over all ranks, tokens are those of the branch.
    """

    k: int
    name: str
    plan: AccumulationPlan
    last_plan: AccumulationPlan
    learning_rate: float
    num_steps: int
    block_size: int
    wandb_run_name: str

    @property
    def global_batch_size(self) -> int:
        """Sequences of an optimizer step."""
        return self.plan.global_batch_size

    @property
    def last_step_sequences(self) -> int:
        """Sequences of the last optimizer step."""
        return self.last_plan.global_batch_size

    @property
    def tokens(self) -> int:
        """Tokens that the branch sees, the same for all branches of a plan."""
        return ((self.num_steps - 1) * self.global_batch_size + self.last_step_sequences) * self.block_size


@dataclass(frozen=True, kw_only=True)
class BranchPlan:
    """The branches, in the order asked for, and what they come from. Iterates over the branches.

    tokens: of each branch; tokens_asked: what they were rounded down from.
    """

    branches: tuple[Branch, ...]
    base_name: str
    base_batch: int
    base_lr: float
    lr_scaling: str
    block_size: int
    tokens: int
    tokens_asked: int
    max_device_batch: int
    world_size: int

    def __iter__(self) -> Iterator[Branch]:
        return iter(self.branches)

    def __len__(self) -> int:
        return len(self.branches)

    @property
    def sequences(self) -> int:
        """Sequences of each branch."""
        return self.tokens // self.block_size


def plan_branches(
    *,
    k_values: Iterable[int],
    base_batch: int,
    base_lr: float,
    block_size: int,
    tokens: int,
    max_device_batch: int,
    world_size: int = 1,
    lr_scaling: str = "sqrt",
    base_name: str = BASE_NAME,
) -> BranchPlan:
    """Plan a branch for each k: batch k x ``base_batch`` sequences, rate by ``lr_scaling``.

    tokens: of each branch, rounded down to whole sequences of ``block_size`` on every rank. max_device_batch:
    the most sequences that fit on a device. Raises ``ValueError`` with one line for what cannot be planned.
    """
    ks = _checked_ks(k_values)
    base, ranks = whole("base_batch", base_batch), whole("world_size", world_size)
    size, limit = whole("block_size", block_size), whole("max_device_batch", max_device_batch)
    asked = whole("tokens", tokens)
    rates = [_rate(k, base_lr, lr_scaling) for k in ks]
    name = _checked_name(base_name)
    _check_shared(ks, base, ranks)
    sequences = asked // size // ranks * ranks
    _check_one_step(max(ks), base, size, asked)

    branch = partial(_branch, base=base, limit=limit, ranks=ranks, sequences=sequences, size=size, name=name)
    return BranchPlan(
        branches=tuple(branch(k=k, learning_rate=rate) for k, rate in zip(ks, rates, strict=True)),
        base_name=name,
        base_batch=base,
        base_lr=float(base_lr),
        lr_scaling=lr_scaling,
        block_size=size,
        tokens=sequences * size,
        tokens_asked=asked,
        max_device_batch=limit,
        world_size=ranks,
    )


def _branch(
    *,
    k: int,
    learning_rate: float,
    base: int,
    limit: int,
    ranks: int,
    sequences: int,
    size: int,
    name: str,
) -> Branch:
    plan = plan_accumulation(k * base, limit, ranks)
    steps = -(-sequences // plan.global_batch_size)
    left = sequences - (steps - 1) * plan.global_batch_size
    return Branch(
        k=k,
        name=f"branch_k{k}",
        plan=plan,
        # Within the micro-batch of the other steps: a script that knows this one plans the same.
        last_plan=plan_accumulation(left, plan.device_batch_size, ranks),
        learning_rate=learning_rate,
        num_steps=steps,
        block_size=size,
        wandb_run_name=f"{name}-k{k}-bs{plan.global_batch_size}-lr{learning_rate:.4g}",
    )


def _checked_ks(values: Iterable[int]) -> list[int]:
    ks = [whole("k", value) for value in values]
    if not ks:
        raise ValueError("no k is given; give one or more, such as 1 2 4")
    if twice := [k for number, k in enumerate(ks) if k in ks[:number]]:
        raise ValueError(f"k {twice[0]} is given twice; give each k once")
    return ks


def _rate(k: int, base_lr: float, lr_scaling: str) -> float:
    if lr_scaling not in LR_SCALINGS:
        raise ValueError(f"lr_scaling is {lr_scaling!r}; legal are {', '.join(LR_SCALINGS)}")
    number = isinstance(base_lr, (int, float)) and not isinstance(base_lr, bool)
    if not number or not 0 < base_lr < math.inf:
        raise ValueError(f"base_lr is {base_lr!r}; legal is a finite number above 0")
    try:
        rate = LR_SCALINGS[lr_scaling](k) * float(base_lr)
    except OverflowError:  # whole numbers beyond what a float can be
        rate = math.inf
    if rate == math.inf:
        raise ValueError(
            f"base_lr {base_lr!r} by {lr_scaling} of k {k} is no finite number; give a smaller one"
        )
    return rate


def _checked_name(name: str) -> str:
    if not isinstance(name, str) or not _LEGAL_NAME.fullmatch(name):
        raise ValueError(
            f"base_name is {name!r}; legal are up to 64 letters, digits, '.', '_' and '-', "
            "with a letter or digit first"
        )
    return name


def _check_shared(ks: list[int], base: int, ranks: int) -> None:
    """Every step has to give every rank the same number of sequences."""
    for k in ks:
        if k * base % ranks:
            near = [size for size in (base // ranks * ranks, -(-base // ranks) * ranks) if size]
            raise ValueError(
                f"k {k} makes a batch of {k} x {base} = {k * base}, which {ranks} ranks cannot share "
                f"equally; take a base batch of {' or '.join(map(str, near))}"
            )


def _check_one_step(k: int, base: int, block_size: int, asked: int) -> None:
    """The largest branch has to have one whole step: the batch that it is there for."""
    if (whole := asked // block_size) < k * base:
        raise ValueError(
            f"{asked} tokens are {whole} sequence{'s' * (whole != 1)} of {block_size}, fewer than the "
            f"{k * base} ({k} x {base}) of one step of k {k}; give {k * base * block_size} tokens or more, "
            "or a smaller batch"
        )
