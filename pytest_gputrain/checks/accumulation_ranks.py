"""The part of ``accumulation_schedule`` on all ranks: how often gradients are synchronised in a window.

What torch's flight recorder saw of a window of several micro-batches beside one of a single micro-batch;
whether ``no_sync`` was on in a backward pass whose forward had been made without it, where it does nothing;
and whether the ranks end with the same parameters.
"""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from pytest_gputrain.case import TrainingCase
from pytest_gputrain.case.returned import wrapped_by
from pytest_gputrain.checks.accumulation_schedule import WINDOWS
from pytest_gputrain.checks.context import CheckContext
from pytest_gputrain.checks.result import CheckFailed, Figures

NUM_MICRO_BATCHES = 4
_REDUCTIONS = ("all_reduce", "reduce_scatter", "allreduce")
_BYTES = {"Double": 8, "Long": 8, "Half": 2, "BFloat16": 2, "Short": 2, "Char": 1, "Byte": 1, "Bool": 1}
_OTHER_BYTES = 4
# Of all that is reduced in a window of one micro-batch: a loss or a count of tokens is less.
SMALL = 0.5


@dataclass
class Synced:
    """The last window of its size. reduced: bytes of each reduction; pairs: DDP's switch in each pass."""

    reduced: list[int] = field(default_factory=list)
    pairs: list[tuple[bool, bool]] = field(default_factory=list)
    equal: bool = True

    @property
    def total(self) -> int:
        return sum(self.reduced)


@dataclass
class RankRun:
    num: int
    one: Synced
    many: Synced


def run_ranks(case: TrainingCase, ctx: CheckContext) -> RankRun:
    """In each rank: windows of one micro-batch, then of several."""
    from pytest_gputrain.checks.peers import Peers, digests_of
    from pytest_gputrain.checks.ranks import mark_progress
    from pytest_gputrain.checks.session import (
        build_model,
        build_optimizer,
        draw_batch,
        seed_for,
        take_step,
        trained_parameters,
    )

    peers = Peers()
    model = build_model(case, ctx)
    wrapped = wrapped_by(case, model)
    optimizer = build_optimizer(case, model, wrapped)
    num = NUM_MICRO_BATCHES if ctx.batch_size >= NUM_MICRO_BATCHES else 2
    found = []
    step = 0
    for parts in (1, num):
        synced = Synced()
        for _ in range(WINDOWS):
            mark_progress(step)
            batches = [draw_batch(case, ctx, step * num + part, peers.rank) for part in range(parts)]
            with watched_sync(synced):
                take_step(case, wrapped, optimizer, batches, seed_for(ctx, step, peers.rank))
            step += 1
        parameters = trained_parameters(model, wrapped, optimizer)
        synced.equal = not any(peers.deviating(digests_of(parameters)))
        found.append(synced)
    return RankRun(num, *found)


@contextlib.contextmanager
def watched_sync(synced: Synced) -> Iterator[None]:
    """Fills ``synced`` with what is reduced within the block, and how DDP's switch stood."""
    from pytest_gputrain.trace.steps import patched_backward

    before = len(_recorded())
    forwards: dict[int, tuple[Any, bool]] = {}
    synced.pairs = []

    def backward(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        # Some models run forward several times before one backward: the last one counts.
        for module, was_on in forwards.values():
            synced.pairs.append((was_on, bool(module.require_backward_grad_sync)))
        forwards.clear()
        return original(*args, **kwargs)

    with _forwards_of_ddp(forwards), patched_backward(backward):
        yield
    synced.reduced = [_size(each) for each in _recorded()[before:] if _reduces(each)]


@contextlib.contextmanager
def _forwards_of_ddp(forwards: dict[int, tuple[Any, bool]]) -> Iterator[None]:
    import torch
    from torch.nn.modules.module import register_module_forward_pre_hook
    from torch.nn.parallel import DistributedDataParallel

    def hook(module: Any, args: Any) -> None:
        if isinstance(module, DistributedDataParallel) and torch.is_grad_enabled():
            forwards[id(module)] = module, bool(module.require_backward_grad_sync)

    handle = register_module_forward_pre_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def _recorded() -> list[dict[str, Any]]:
    """What torch's flight recorder holds of collectives."""
    import torch

    bindings: Any = torch._C._distributed_c10d
    return list(json.loads(bindings._dump_fr_trace_json(True, False)).get("entries", []))


def _reduces(entry: dict[str, Any]) -> bool:
    name = str(entry.get("profiling_name", "")).rpartition(":")[2]
    return name.startswith(_REDUCTIONS) or name.lstrip("_").startswith(_REDUCTIONS)


def _size(entry: dict[str, Any]) -> int:
    kinds = entry.get("input_dtypes", [])
    return sum(
        math.prod(size) * _BYTES.get(kind, _OTHER_BYTES)
        for size, kind in zip(entry.get("input_sizes", []), kinds, strict=False)
    )


def judge_ranks(runs: Sequence[RankRun]) -> Figures:
    """Raises CheckFailed where synchronisation is missing or ``no_sync`` has no effect; its cost."""
    first = runs[0]
    num, one, many = first.num, first.one, first.many
    _judge_equal(runs)
    if any(was_on and not is_on for run in runs for was_on, is_on in run.many.pairs):
        raise CheckFailed(
            f"no_sync() is on in backward, but was off in forward, where it decides: all {num} micro-batches "
            "synchronise\n  likely: `with model.no_sync():` stands around the backward only; put the forward "
            "under it too"
        )
    figures: Figures = {
        "ranks": len(runs),
        "all-reduces a step": len(many.reduced),
        "bytes a step": many.total,
    }
    if one.total and many.total > (1 + SMALL) * one.total:
        times = many.total / one.total
        more = many.total - one.total
        figures["bytes saved by no_sync"] = more
        figures["remarks"] = [
            f"gradients are synchronised {times:.3g} times in a window of {num} micro-batches: "
            "no_sync() would "
            f"save {len(many.reduced) - len(one.reduced)} of {len(many.reduced)} all-reduces, "
            f"{_human(more)} a step "
            "and rank"
        ]
    return figures


def _judge_equal(runs: Sequence[RankRun]) -> None:
    first = runs[0]
    under = [bool(run.many.pairs) and not run.many.pairs[-1][0] for run in runs]
    if first.many.equal:
        return
    if any(under):
        raise CheckFailed(
            f"the last of {first.num} micro-batches is under no_sync(), so the window's gradients "
            "are not averaged "
            f"and the {len(runs)} ranks have different parameters\n"
            "  likely: no_sync() covers every micro-batch, or all but the first; it has to cover "
            "all but the last"
        )
    if first.one.equal:
        raise CheckFailed(
            f"after windows of {first.num} micro-batches the {len(runs)} ranks have different "
            "parameters, after "
            "windows of one they have not\n  likely: what the last micro-batch synchronises is not the whole "
            "window's gradient"
        )


def _human(count: int) -> str:
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return f"{count} B"
