"""A probe: a few real training steps at one batch size, under a limit, and no trace of them afterwards.

A step is the case's own: forward, backward, what it clips, the optimizer step. The first allocates the
optimizer's state and only the second has everything at once, so a probe takes several; then one evaluation,
without gradients, at its own batch size and with all of training still in memory. Activation checkpointing,
compiling and data parallel are as in training.
"""

from __future__ import annotations

import contextlib
import gc
import logging
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from pytest_gputrain.batch import probe_world
from pytest_gputrain.batch.probe_batches import Draw
from pytest_gputrain.batch.probe_findings import Observed, kernel_limit
from pytest_gputrain.batch.probe_globals import global_hooks, preserved
from pytest_gputrain.batch.probe_state import Snapshot
from pytest_gputrain.batch.users_own import users_own
from pytest_gputrain.case import TrainingCase
from pytest_gputrain.case.returned import wrapped_by
from pytest_gputrain.memory.clean import clear_frames, release
from pytest_gputrain.memory.guard import OomGuard
from pytest_gputrain.memory.oom import is_oom

log = logging.getLogger("pytest_gputrain.batch")

ITERATIONS = 3
"""Two steps have everything in memory; the third tells whether memory grows from step to step."""


@dataclass(frozen=True)
class Conditions:
    """How training will run. ``micro_batches``: of a device batch size, how many a step takes (see
    ``find_batch``).

    ``compiled``, ``checkpointing``: do to the model what the case does for it; False for a model that is as
    it will be trained. ``wrapped``: data parallel. ``eval_batch_factor``: 0 leaves evaluation out.
    """

    micro_batches: Callable[[int], int] = lambda batch_size: 1
    iterations: int = ITERATIONS
    eval_batch_factor: float = 1.0
    compiled: bool = False
    checkpointing: bool = False
    wrapped: bool = False


class TrainingProbe:
    """``probe(batch_size) -> peak in bytes``, None when memory ran out. A context manager around all probes.

    On leaving, model, optimizer and process are as they were on entering. ``observed``: by batch size, what
    the probes saw.
    """

    def __init__(
        self,
        case: TrainingCase,
        model: torch.nn.Module,
        conditions: Conditions,
        *,
        device: torch.device,
        limit: int,
        optimizer: torch.optim.Optimizer | None = None,
    ) -> None:
        self.case = case
        self.model = model
        self.conditions = conditions
        self.device = device
        self.limit = limit
        self.optimizer = optimizer
        self.observed: dict[int, Observed] = {}
        self._stack = contextlib.ExitStack()
        self._snapshot: Snapshot | None = None

    def __enter__(self) -> TrainingProbe:
        with contextlib.ExitStack() as stack:
            stack.enter_context(preserved())
            stack.callback(release)
            stack.enter_context(_quick_collections())
            roots = [self.model, *global_hooks(), *([self.optimizer] if self.optimizer is not None else [])]
            loop = (self.case.step, self.case.loss)
            self._snapshot = stack.enter_context(Snapshot(*roots, functions=loop))
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *exc: Any) -> None:
        self._stack.close()

    def __call__(self, batch_size: int) -> int | None:
        assert self._snapshot is not None, "a probe runs inside of its with block"
        self.observed[batch_size] = observed = Observed()
        try:
            with preserved(), self._world(), _fresh_compiler(self._compiles()), users_own():
                return self._within_limit(batch_size, observed)
        except Exception as error:
            if is_oom(error):
                observed.ran_out(error)
                clear_frames(error)
                return None
            self._explain(error, batch_size)
            raise
        finally:
            self._snapshot.rewind()
            release()

    def _explain(self, error: BaseException, batch_size: int) -> None:
        """Add to the user's exception what it cannot know; it is raised as it is."""
        notes = []
        if said := kernel_limit(error, batch_size, self.observed, self.limit):
            notes.append(said)
            log.warning("%s", said)
        if self.observed[batch_size].in_evaluation:
            notes.append("raised in evaluation (model.eval(), no_grad); eval_batch_factor=0 leaves that out")
        if hasattr(error, "add_note"):  # from Python 3.11 on
            for note in notes:
                error.add_note(note)

    def _world(self) -> contextlib.AbstractContextManager[None]:
        if self.conditions.wrapped or probe_world.others_are_there():
            return probe_world.of_one()
        return contextlib.nullcontext()

    def _within_limit(self, batch_size: int, observed: Observed) -> int:
        roots = [self.model, *([self.optimizer] if self.optimizer is not None else [])]
        with OomGuard(self.limit, self.device, roots=roots) as guard, torch.enable_grad():
            try:
                self._train_and_evaluate(batch_size, observed, guard)
            finally:
                observed.by_category = dict(guard.by_category)
        observed.peak = guard.peak_bytes
        return guard.peak_bytes

    def _train_and_evaluate(self, batch_size: int, observed: Observed, guard: OomGuard) -> None:
        model = self._as_trained()
        optimizer = self._optimizer(model)
        draw = Draw(self.case, self.device, observed)
        micro_batches = self.conditions.micro_batches(batch_size)
        for _ in range(self.conditions.iterations):
            with guard.uncounted():
                batch = draw(batch_size)
            # The same batch again, not more of them: a loop that accumulates loads one after the other.
            self.case.step(model, optimizer, [batch] * micro_batches)
            del batch
            self._synchronize()
            _raise_swallowed(guard, observed)
            observed.after_step(guard.in_use)
        if factor := self.conditions.eval_batch_factor:
            observed.in_evaluation = True
            with guard.uncounted():
                batch = draw(math.ceil(batch_size * factor))
            self._evaluate(model, batch)
            _raise_swallowed(guard, observed)
            observed.in_evaluation = False

    def _as_trained(self) -> Any:
        model: Any = self.model
        if not model.training:
            model.train()
        if self.conditions.checkpointing:
            assert self.case.set_checkpointing is not None
            self.case.set_checkpointing(model, None)
        if self.conditions.compiled:
            model = self.case.compile(model)
        return wrapped_by(self.case, model) if self.conditions.wrapped else model

    def _optimizer(self, model: Any) -> Any:
        if self.optimizer is not None:
            return self.optimizer
        # Of the bare model where wrapping keeps its parameters, as most loops write it.
        same = {id(one) for one in self.model.parameters()} == {id(one) for one in model.parameters()}
        return self.case.optimizer(self.model if same else model)

    def _evaluate(self, model: Any, batch: Any) -> None:
        model.eval()
        with torch.no_grad():
            self.case.loss(model, batch)
        self._synchronize()

    def _synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def _compiles(self) -> bool:
        return self.conditions.compiled or any(
            hasattr(module, "_orig_mod") or getattr(module, "_compiled_call_impl", None) is not None
            for module in self.model.modules()
        )


def _raise_swallowed(guard: OomGuard, observed: Observed) -> None:
    """A step that catches an out-of-memory and leaves the batch out has not trained at this size.

    Raises that OutOfMemory.
    """
    if guard.swallowed is not None:
        observed.swallowed = True
        raise guard.swallowed


@contextlib.contextmanager
def _quick_collections() -> Iterator[None]:
    """What is there now is not looked through after every probe, but again afterwards: with torch loaded,
    that is most of the time that a small model takes.
    """
    if gc.get_freeze_count():  # the user's own: unfreezing would undo it
        yield
        return
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


@contextlib.contextmanager
def _fresh_compiler(wanted: bool) -> Iterator[None]:
    """Each batch size compiled as if it were the only one: after a second one torch compiles for any size,
    and after eight not at all. What the process had compiled before is compiled again when next needed.
    """
    if not wanted:
        yield
        return
    torch.compiler.reset()
    try:
        yield
    finally:
        torch.compiler.reset()
