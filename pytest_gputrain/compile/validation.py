"""``validation``: what a training script says about itself: is it compiled, on which shapes, how fast.

    with validation() as v:
        for batch in batches:
            with v.step(batch):
                train_on(batch)  # forward, backward, the optimizer's step
            evaluate()           # outside of a step: not timed

Nothing is printed, watched or synchronised unless ``enabled=True`` or ``GPUTRAIN_VALIDATE=1`` says so; then:

    [VALIDATION] ✓ Model is compiled
    [VALIDATION] Step 0 | Batch shape: torch.Size([4, 2048])
    [VALIDATION] Avg time/step: 2.450s | Tokens/sec: 3265.3

"Compiled" says that compiled graphs ran in the step, not that the model has a wrapper. Imports no torch.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import TYPE_CHECKING, Any

from pytest_gputrain.compile.batch_tokens import BatchTokens, tokens_of
from pytest_gputrain.compile.step_times import WARMUP, StepTimes
from pytest_gputrain.compile.verdict_lines import BETWEEN, TRAIN, WRONG, VerdictLines
from pytest_gputrain.values import LEGAL_FLAG, parse_flag

if TYPE_CHECKING:
    from pytest_gputrain.compile.monitor import CompileMonitor

VARIABLE = "GPUTRAIN_VALIDATE"
MARK = "[VALIDATION]"
_MOST_SHAPES = 8  # that are told: a loop whose shapes always change would tell nothing else


def validation(
    *, enabled: bool | None = None, warmup: int = WARMUP, num_targets: Callable[[Any], int] | None = None
) -> Validation:
    """A context manager around training; ``.step(batch)`` around each step of it. See the module.

    enabled: None asks ``GPUTRAIN_VALIDATE``. warmup: steps that are in no average. num_targets(batch): the
    tokens that count in the loss; without it labels of -100 or an attention mask tell. While it watches, what
    was compiled before is compiled anew, and one `compile_monitor` is open: no other may be.
    Raises ValueError for a variable or a number that is not legal.
    """
    if not isinstance(warmup, int) or warmup < 0:
        raise ValueError(f"warmup is {warmup!r}; give a number of steps, 0 or more")
    return Validation(_switch() if enabled is None else enabled, warmup, num_targets)


def _switch() -> bool:
    text = os.environ.get(VARIABLE, "").strip()
    try:
        return bool(text) and parse_flag(text)
    except ValueError:
        raise ValueError(f"{VARIABLE}={text!r} is not legal; give {LEGAL_FLAG}") from None


class Validation:
    """What `validation` returns. Every rank watches, the first one prints."""

    def __init__(self, enabled: bool, warmup: int, num_targets: Callable[[Any], int] | None) -> None:
        self.enabled = enabled
        self._num_targets = num_targets
        self._times = StepTimes(warmup)
        self._shapes: list[str] = []
        self._stack = contextlib.ExitStack()
        self._monitor: CompileMonitor | None = None
        self._verdict: VerdictLines | None = None

    def __enter__(self) -> Validation:
        if self.enabled:
            from pytest_gputrain.compile.monitor import compile_monitor

            self._monitor = self._stack.enter_context(compile_monitor())
            self._verdict = VerdictLines(self._monitor)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.__exit__(kind, error, trace)
        if self._verdict is not None and error is None:
            self._tell(*self._verdict.at_the_end(self._times.warmup))
            _, world_size = _place()
            # Of this rank's batches: what the others are given it does not know.
            of = f" | rank 0 of {world_size}" if world_size > 1 else ""
            self._tell(*(line + of for line in self._times.lines()))

    @contextlib.contextmanager
    def step(self, batch: Any = None) -> Iterator[None]:
        """Around one training step. ``batch``: what it trains on, or the list of its micro-batches; without
        it only time is told.
        """
        if self._monitor is None or self._verdict is None:
            yield
            return
        number = len(self._times.steps)
        tokens = tokens_of(batch, self._num_targets)  # before the clock starts: it waits for the device
        self._monitor.step(number, TRAIN)
        started = _clock()
        yield
        seconds = _clock() - started
        self._monitor.phase(BETWEEN)
        self._times.add(seconds, tokens)
        self._tell(*self._verdict.after_step(number))
        self._tell_shape(number, tokens)

    def figures(self) -> dict[str, Any]:
        """``is_compiled``, counts of graphs and recompiles, and `StepTimes.figures`; empty if not enabled."""
        if self._verdict is None:
            return {}
        return {**self._verdict.figures(), **self._times.figures()}

    def _tell_shape(self, number: int, tokens: BatchTokens) -> None:
        shape = f"torch.Size({list(tokens.shape)})"
        if not tokens.shape:
            return
        if tokens.num_micro_batches > 1:
            shape += f" x {tokens.num_micro_batches} micro-batches"
        if not self._shapes or (shape != self._shapes[-1] and len(self._shapes) < _MOST_SHAPES):
            self._tell(f"Step {number} | Batch shape: {shape}")
            self._shapes.append(shape)

    def _tell(self, *lines: str) -> None:
        """What is wrong is said by each rank: on the others it may be all right."""
        rank, _ = _place()
        for line in lines:
            if rank == 0:
                print(f"{MARK} {line}", flush=True)
            elif line.startswith(WRONG):
                print(f"{MARK} {line} | rank {rank}", flush=True)


def _clock() -> float:
    """Seconds, when what was asked of the GPU has been done."""
    import torch

    if torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return time.perf_counter()


def _place() -> tuple[int, int]:
    """(rank, number of ranks) of this process."""
    import torch.distributed as dist

    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return int(os.environ.get("RANK") or 0), int(os.environ.get("WORLD_SIZE") or 1)
