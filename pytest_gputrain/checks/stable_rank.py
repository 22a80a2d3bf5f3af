"""A stability run in one rank: the case's loop, a record a step, and an end at the first step that is wrong.

Ranks agree every few steps, by one collective, whether all of them are well and hold the same weights; so
all stop at the same step, and none waits for another that has left.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pytest_gputrain.case import TrainingCase
from pytest_gputrain.case.returned import wrapped_by
from pytest_gputrain.checks.context import CheckContext
from pytest_gputrain.checks.peers import Peers
from pytest_gputrain.checks.stable_data import Feed, Shapes, counted
from pytest_gputrain.checks.stable_end import close, not_finite_buffers
from pytest_gputrain.checks.stable_outlook import Outlooks
from pytest_gputrain.checks.stable_probe import Probe
from pytest_gputrain.checks.stable_told import Ended, Order
from pytest_gputrain.checks.stable_untrained import Untrained
from pytest_gputrain.checks.stable_vote import Vote, is_due
from pytest_gputrain.checks.stable_weights import weights
from pytest_gputrain.checks.stable_words import other_data
from pytest_gputrain.endurance.ahead import KIND
from pytest_gputrain.endurance.children import Children
from pytest_gputrain.endurance.findings import Finding
from pytest_gputrain.endurance.judge import grows
from pytest_gputrain.endurance.offspring import offspring
from pytest_gputrain.endurance.plan import MOST_STEPS, is_late
from pytest_gputrain.endurance.records import RecordWriter, StepRecord, path_of, read_records, write_records


def run(case: TrainingCase, ctx: CheckContext, order: Order) -> Ended:
    """In each rank."""
    with _within(order, ctx) as guard:
        ended = _Run(case, ctx, order).all_steps()
    if guard is not None:
        ended.peak_bytes = guard.peak_bytes
    return ended


@contextlib.contextmanager
def _within(order: Order, ctx: CheckContext) -> Iterator[Any]:
    if order.capacity is None:
        yield None
        return
    from pytest_gputrain.checks.session import device_of
    from pytest_gputrain.memory.guard import OomGuard

    with OomGuard(order.capacity, device_of(ctx)) as guard:
        yield guard


class _Run:
    def __init__(self, case: TrainingCase, ctx: CheckContext, order: Order) -> None:
        from pytest_gputrain.checks.session import build_model, build_optimizer, device_of, trained_parameters

        self.case, self.ctx, self.order, self.folder = case, ctx, order, Path(order.folder)
        self.peers, self.device = Peers(), device_of(ctx)
        self.model = build_model(case, ctx)
        self.wrapped = wrapped_by(case, self.model)
        self.optimizer = build_optimizer(case, self.model, self.wrapped)
        self.parameters = trained_parameters(self.model, self.wrapped, self.optimizer)
        ignored = getattr(self.model, "_ddp_params_and_buffers_to_ignore", ())
        self.trained = [p for n, p in self.parameters.items() if p.requires_grad and n not in ignored]
        self.sharded = any(hasattr(parameter, "to_local") for parameter in self.trained)
        self.feed = Feed(case, ctx, self.peers.rank)
        self.shapes = Shapes()
        self.first_digest = weights(self.trained)[0]
        self.ended = Ended()
        self.recorded: dict[int, str | None] = {}
        self.recorded_weights: dict[int, str | None] = {}
        self.differs = False
        self.losses: list[float | None] = []
        same = {name: one for name, one in self.parameters.items() if any(one is p for p in self.trained)}
        self.untrained = Untrained(self)
        self.vote = Vote(self.peers, self.parameters, same, self.untrained)
        buffers = [name.removeprefix("module.") for name, _ in self.wrapped.named_buffers()]
        self.well_buffers = set(buffers) - not_finite_buffers(self.wrapped)

    @property
    def same_everywhere(self) -> bool:
        """Whether every rank has to hold the same trained parameters."""
        return not self.sharded

    def all_steps(self) -> Ended:
        from pytest_gputrain.checks.stable_watch import Watch

        self.started = time.monotonic()
        probe = Probe(self)
        self.ended.before = probe.losses()
        done = self._resume()
        if self.ended.finding is None:
            self.ended.finding = self.untrained.begin()
        if self.ended.finding is None:
            self.writer = RecordWriter(path_of(self.folder, self.peers.rank))
            try:
                with Watch(
                    self.case,
                    self.model,
                    self.wrapped,
                    self.optimizer,
                    self.trained,
                    self.device,
                    self.order.iterations or MOST_STEPS,
                ) as watch:
                    self._train(done, watch)
                self.ended.rate = watch.rate
            finally:
                self.writer.close()
            if self.ended.finding is None or self.ended.finding.kind in (KIND, "victim"):
                self._ask_who_grew(watch)
        if self.ended.finding is None:
            close(self, probe)
        return self.ended

    def _ask_who_grew(self, watch: Any) -> None:
        from pytest_gputrain.checks.stable_children import worker_names

        records = read_records(path_of(self.folder, self.peers.rank)).records
        if grows(records):
            self.ended.held = watch.held()
        if offspring({self.peers.rank: records}, {}):
            self.ended.workers = worker_names()

    def _resume(self) -> int:
        """Go back to the checkpoint, if one is asked for. Returns its step."""
        from pytest_gputrain.checks.stable_state import load

        step, path = self.order.resume_at, path_of(self.folder, self.peers.rank)
        earlier = read_records(path).records
        self.recorded = {record.step: record.batch_digest for record in earlier}
        self.recorded_weights = {record.step: record.digest for record in earlier}
        write_records(path, [record for record in earlier if record.step <= step])
        if step:
            self._other_data(self.feed.forward(step, self.recorded))
            load(self.folder, step, self.peers.rank, self)
        return step

    def _other_data(self, step: int | None) -> bool:
        """A collective: whether any rank draws other data than it recorded, which ends the run."""
        ranks = self.peers.flagged([step is not None])[0]
        if not ranks:
            return False
        if step is not None:
            self.ended.finding = other_data(step, self.peers.rank)
        else:
            self.ended.finding = Finding("victim", None, self.peers.rank, "")
        return True

    def _train(self, done: int, watch: Any) -> None:
        most = self.order.iterations or MOST_STEPS
        children = Children(most)
        outlooks = Outlooks(self.device, self.order.capacity, self.order.iterations)
        for step in range(done + 1, most + 1):
            seen = children.look(step)
            watch.load()
            batch, digest = self.feed.next()
            other = step if self.recorded.get(step) not in (None, digest) else None
            if step <= self.order.recorded_until and self._other_data(other):
                break
            record = self._take(step, batch, digest, watch, seen)
            self.writer.write(record)
            self.losses.append(record.loss)
            self.ended.steps = step
            self.vote.take(record, batch)
            self.vote.blame(outlooks.add(record, self.peers.rank))
            self._compare_with_recorded(record)
            saves = self.order.keeps and step % self.order.save_every == 0 and step < most
            ends = False
            if is_due(step) or step == most or saves:
                self.ended.finding, ends = self.vote.hold(self._is_late(step))
            watch.voted()
            if self.ended.finding is not None:
                break
            if saves:
                from pytest_gputrain.checks.stable_state import save

                save(self.folder, step, self.peers.rank, self)
            if ends:
                break

    def _take(self, step: int, batch: Any, digest: str, watch: Any, seen: Mapping[str, Any]) -> StepRecord:
        from pytest_gputrain.checks.session import loss_value, seed_for, take_step

        size = {**counted(batch), "shapes": self.shapes.count(batch)}
        seed = seed_for(self.ctx, step, self.peers.rank)
        watch.begin()
        began = time.perf_counter()
        loss = loss_value(take_step(self.case, self.wrapped, self.optimizer, [batch], seed))
        seconds = time.perf_counter() - began
        watched = watch.end(step, seconds, loss)
        watched["digest"] = None if self.sharded else self.untrained.added_to(watched["digest"], step)
        watched["finite"]["loss"] = loss is None or math.isfinite(loss)
        return StepRecord(
            step=step,
            loss=loss,
            seconds=seconds,
            **size,
            batch_digest=digest,
            wall=time.time(),
            **watched,
            **seen,
        )

    def _is_late(self, step: int) -> bool:
        by_time = self.order.iterations is None and self.peers.rank == 0
        return by_time and is_late(step, time.monotonic() - self.started)

    def _compare_with_recorded(self, record: StepRecord) -> None:
        """Of a run that resumed: the steps after the checkpoint have to come out as before."""
        was = self.recorded_weights.get(record.step)
        if was not in (None, record.digest) and not self.differs:
            self.differs = True
            self.ended.notes.append(
                f"step {record.step} gave other weights than it did before the kill: what step keeps for "
                "itself is not resumed without state_dict() and load_state_dict(), or the arithmetic is not "
                "deterministic"
            )
