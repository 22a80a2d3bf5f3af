"""Random numbers on ranks: equal where an activation is on all of them, and that is all that is asked.

Where activations are sharded, equal masks on all ranks are no bug of arithmetic, only dropout that is less
random than it should be; that is told and does not fail.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from pytest_gputrain.case import pytree
from pytest_gputrain.tensor_parallel.golden_outputs import main_output
from pytest_gputrain.tensor_parallel.golden_pair import Pair
from pytest_gputrain.tensor_parallel.golden_world import World
from pytest_gputrain.tensor_parallel.records import Finding
from pytest_gputrain.trace.digest import tensor_digest

Call = dict[int, tuple[str, str]]  # by rank, what went in and where zeros came out


class _Watch(TorchFunctionMode):
    """Every dropout that drops: digests of its input and of its mask, by rank held."""

    def __init__(self, world: World) -> None:
        super().__init__()
        self.world = world
        self.calls: list[tuple[str, Call]] = []
        self.inside: list[str] = []

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__name__", "") not in ("dropout", "dropout_") or not args:
            return func(*args, **kwargs)
        before = {rank: piece.clone() for rank, piece in self.world.pieces(args[0]).items()}
        output = func(*args, **kwargs)
        after = self.world.pieces(output)
        masks = {rank: (after[rank] == 0) & (before[rank] != 0) for rank in before}
        if any(bool(mask.any()) for mask in masks.values()):
            call = {r: (tensor_digest(before[r]), tensor_digest(masks[r])) for r in before}
            self.calls.append((self.inside[-1] if self.inside else "", call))
        return output


def random_findings(pair: Pair, batch: Any) -> list[Finding]:
    """One forward with dropout on, from the random state that parallelize left; collective."""
    calls, output = _forward(pair, batch)
    world = pair.world
    findings = []
    by_rank = world.merged({r: [(name, call[r]) for name, call in calls] for r in world.held})
    if len({len(one) for one in by_rank}) == 1:
        judged = (_judge([calls[index] for calls in by_rank], world.size) for index in range(len(by_rank[0])))
        findings = list({one.message: one for one in judged if one}.values())
    if not any(one.fails for one in findings) and output is not None:
        digests = world.merged({rank: tensor_digest(piece) for rank, piece in output.items()})
        shapes = world.merged({rank: tuple(piece.shape) for rank, piece in output.items()})
        if len(set(digests)) > 1 and shapes == [pair.output_shape(batch)] * world.size:
            findings.append(
                Finding(
                    "outputs_differ",
                    "",
                    "in training mode the ranks' outputs differ: random numbers of "
                    "ranks differ where their activations are the same",
                )
            )
    return findings


def _forward(pair: Pair, batch: Any) -> tuple[list[tuple[str, Call]], Any]:
    watch = _Watch(pair.world)
    handles = []
    seen: list[Any] = []
    for name, module in pair.parallel.named_modules():
        handles.append(module.register_forward_pre_hook(partial(_enter, watch.inside, name)))
        handles.append(module.register_forward_hook(partial(_leave, watch.inside)))
    handles.append(pair.parallel.register_forward_hook(lambda m, a, output: seen.append(output)))
    try:
        torch.set_rng_state(pair.random_state)
        with pair.world.acting(), torch.no_grad(), watch:
            pair.case.loss(pair.parallel, pytree.map_tensors(torch.clone, batch))
    finally:
        for handle in handles:
            handle.remove()
    found = main_output(seen[0]) if seen else None
    return watch.calls, pair.world.whole(found[1]) if found else None


def _enter(inside: list[str], name: str, module: Any, args: Any) -> None:
    inside.append(name)


def _leave(inside: list[str], module: Any, args: Any, output: Any) -> None:
    if inside:
        inside.pop()


def _judge(calls: list[tuple[str, tuple[str, str]]], size: int) -> Finding | None:
    where = calls[0][0] or "the model"
    entered, masked = {call[1][0] for call in calls}, {call[1][1] for call in calls}
    if len(entered) == 1 and len(masked) > 1:
        return Finding(
            "dropout_differs",
            where,
            f"dropout in {where} drops other elements on other ranks of an activation that is the same on "
            f"all {size}: what is replicated needs the same random numbers on every rank",
        )
    if len(entered) == size and len(masked) == 1:
        return Finding(
            "dropout_repeats",
            where,
            f"dropout in {where} drops the same elements of every rank's part of a sharded activation",
            fails=False,
        )
    return None
