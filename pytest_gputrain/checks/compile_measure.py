"""Eager and compiled training timed in turn, on one process or on all ranks, the same way for both.

Blocks of steps, alternately one side's and the other's: a machine that becomes slower slows both. Each block
is synchronised before and after and holds training steps only; the first steps of each side, and all that
compile, come before. Batches are on the device beforehand, so loading data is in neither.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from pytest_gputrain.case import TrainingCase, pytree
from pytest_gputrain.checks.compile_context import backend_of
from pytest_gputrain.checks.compile_sides import Side, Snapshot, compiled, copied, eager
from pytest_gputrain.checks.context import CheckContext
from pytest_gputrain.checks.flops import Flops, count_flops
from pytest_gputrain.checks.session import draw_batch, seed_everything, seed_for, stream
from pytest_gputrain.compile.batch_tokens import BatchTokens, tokens_of
from pytest_gputrain.compile.monitor import CompileMonitor, compile_monitor
from pytest_gputrain.compile.speed import WARM_UP, Block, SpeedReport, compare, settled, side_of

if TYPE_CHECKING:
    from collections.abc import Callable

BLOCKS, STEPS = 10, 10
BATCHES = 8
MOST_WARM_UP = 30


def measure(case: TrainingCase, ctx: CheckContext, blocks: int = BLOCKS, steps: int = STEPS) -> SpeedReport:
    """In a rank, of one or of several. ``blocks`` of ``steps`` steps of each side."""
    batches = batches_of(case, ctx)
    tokens = [_tokens(case, batch) for batch in batches]
    before = _allocated(ctx)
    slow = eager(case, ctx, wraps=_world_size() > 1)
    start = Snapshot.of(slow.bare)
    warm_up = _Clock(slow, ctx, batches, tokens)
    for _ in range(WARM_UP):
        warm_up.block(1)
    peak = _peak(ctx, lambda: warm_up.block(WARM_UP)) - before
    resident = _allocated(ctx) - before
    flops = count_flops(lambda: warm_up.block(1))
    with backend_of(ctx), compile_monitor() as monitor:
        fast = compiled(case, ctx, start, wraps=_world_size() > 1)
        clock = _Clock(fast, ctx, batches, tokens)
        first, warmed = _warm(clock, monitor)
        compiled_peak = _peak(ctx, lambda: clock.block(WARM_UP)) - before - resident
        seen = monitor.compile_seconds
        timed = _in_turn(warm_up, clock, blocks, steps)
        report = monitor.report()
    notes = []
    if warmed >= MOST_WARM_UP:
        notes.append(f"it still compiled after {MOST_WARM_UP} steps")
    if report.compile_seconds > seen:
        notes.append("it compiled again while it was measured, which is in its time")
    has_memory = ctx.device == "cuda"
    one = side_of(timed[0], warm_up.step_seconds, peak if has_memory else None)
    other = side_of(timed[1], clock.step_seconds, compiled_peak if has_memory else None)
    return SpeedReport(
        case=case.name, device=ctx.device, world_size=_world_size(), eager=one, compiled=other,
        ratio=compare(*timed), first_compile_seconds=max(0.0, first - other.p50), warm_up=warmed,
        tokens_per_step=timed[0][0].tokens // timed[0][0].steps,
        useful_per_step=timed[0][0].useful // timed[0][0].steps,
        graphs=len(report.graphs), breaks=len(report.breaks),
        recompiles=tuple(one.reason for one in report.recompiles),
        flops_per_token=_flops_per_token(flops, timed[0][0]), flops_dtype=flops.dtype if flops else "",
        notes=tuple(notes),
    )  # fmt: skip


def _flops_per_token(flops: Flops | None, block: Block) -> float | None:
    """Of all ranks' products over all ranks' tokens."""
    tokens = block.tokens / block.steps
    return flops.number * _world_size() / tokens if flops and tokens else None


class _Clock:
    """Runs one side's steps over the batches in turn and times them."""

    def __init__(
        self, side: Side, ctx: CheckContext, batches: Sequence[Any], tokens: Sequence[BatchTokens]
    ) -> None:
        self.side, self.ctx, self.batches, self.tokens = side, ctx, batches, tokens
        self.step_seconds: list[float] = []
        self.steps = 0

    def block(self, number: int) -> Block:
        """Steps one after another, synchronised before and after."""
        places = [(self.steps + step) % len(self.batches) for step in range(number)]
        batches = [copied(self.batches[place]) for place in places]
        seed_everything(seed_for(self.ctx, self.steps))
        with self.side.guard():
            _wait(self.ctx, together=True)
            began = time.perf_counter()
            marks = [_mark(self.ctx)]
            for batch in batches:
                self.side.case.step(self.side.run, self.side.optimizer, [batch])
                marks.append(_mark(self.ctx))
            _wait(self.ctx)
            seconds = _longest(time.perf_counter() - began)
        self.step_seconds += [_between(one, other) for one, other in itertools.pairwise(marks)]
        self.steps += number
        total, useful = (
            _over_ranks(sum(values))
            for values in zip(*((t.total, t.total if t.useful is None else t.useful) for t in
                                (self.tokens[place] for place in places)), strict=True)
        )  # fmt: skip
        return Block(seconds, number, total, useful)


def _warm(clock: _Clock, monitor: CompileMonitor) -> tuple[float, int]:
    """Seconds of the first step, and how many steps it took until nothing compiled any more."""
    first = 0.0
    for step in range(MOST_WARM_UP):
        monitor.step(step, "train")
        seconds = clock.block(1).seconds
        first = seconds if step == 0 else first
        by_step = {k: v for k, v in monitor.compile_seconds_by_step.items() if k is not None}
        # All ranks leave together, after the slowest.
        if _longest(settled(by_step)) <= step:
            return first, step + 1
    return first, MOST_WARM_UP


def _in_turn(one: _Clock, other: _Clock, blocks: int, steps: int) -> tuple[list[Block], list[Block]]:
    """Blocks of both; the first alternates, so that neither always follows the other."""
    timed: tuple[list[Block], list[Block]] = ([], [])
    one.step_seconds.clear()
    other.step_seconds.clear()
    # A multiple of the batches: each block then has the same tokens.
    for number in range(blocks):
        for place in (0, 1) if number % 2 == 0 else (1, 0):
            clock = (one, other)[place]
            clock.steps = number * steps
            timed[place].append(clock.block(steps))
    return timed


def batches_of(case: TrainingCase, ctx: CheckContext) -> list[Any]:
    """What both sides train on: the first of the case's own batches that have one shape, on the device."""
    if not case.has_own_batches:
        return [draw_batch(case, ctx, step, _rank()) for step in range(BATCHES)]
    seed_everything(seed_for(ctx, 0, _rank()))
    drawn = list(itertools.islice(stream(case, ctx), BATCHES))
    if not drawn:
        return [draw_batch(case, ctx, step, _rank()) for step in range(BATCHES)]
    return [batch for batch in drawn if _shapes(batch) == _shapes(drawn[0])]


def _shapes(batch: Any) -> list[Any]:
    return [tuple(tensor.shape) for tensor in pytree.tensors(batch)]


def _tokens(case: TrainingCase, batch: Any) -> BatchTokens:
    return tokens_of(batch, case.num_targets)


def _mark(ctx: CheckContext) -> Any:
    """A moment: on CUDA one of the device's, which costs no waiting."""
    if ctx.device != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def _between(one: Any, other: Any) -> float:
    return float(other - one if isinstance(one, float) else one.elapsed_time(other) / 1e3)


def _wait(ctx: CheckContext, *, together: bool = False) -> None:
    if ctx.device == "cuda":
        torch.cuda.synchronize()
    if together and _world_size() > 1:
        dist.barrier()


def _allocated(ctx: CheckContext) -> int:
    return torch.cuda.memory_allocated() if ctx.device == "cuda" else 0


def _peak(ctx: CheckContext, run: Callable[[], object]) -> int:
    if ctx.device != "cuda":
        run()
        return 0
    torch.cuda.reset_peak_memory_stats()
    run()
    return torch.cuda.max_memory_allocated()


def _world_size() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def _rank() -> int:
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def _longest(value: float) -> float:
    return _reduced(value, dist.ReduceOp.MAX)


def _over_ranks(value: int) -> int:
    return int(_reduced(value, dist.ReduceOp.SUM))


def _reduced(value: float, operation: Any) -> float:
    if _world_size() == 1:
        return value
    device = torch.device("cuda", torch.cuda.current_device()) if dist.get_backend() == "nccl" else "cpu"
    reduced = torch.tensor(float(value), dtype=torch.float64, device=device)
    dist.all_reduce(reduced, operation)
    return float(reduced)
