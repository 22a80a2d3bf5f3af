"""The first half of ``ddp_parity``: the case's own loop on every rank, compared after each step."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

from pytest_gputrain.case import TrainingCase, pytree
from pytest_gputrain.case.loading import describe
from pytest_gputrain.case.returned import wrapped_by
from pytest_gputrain.checks.context import CheckContext
from pytest_gputrain.checks.finite import in_words, not_finite
from pytest_gputrain.checks.parity import ACCUMULATING_STEP, NUM_MICRO_BATCHES, STEPS, RankRun, StepFacts
from pytest_gputrain.checks.parity_rank import before_forward, keep_state
from pytest_gputrain.checks.parity_reasons import Reasons
from pytest_gputrain.checks.peers import Peers, digests_of
from pytest_gputrain.trace.digest import is_finite, value_digest
from pytest_gputrain.trace.names import canonical_name, named_buffers, owners
from pytest_gputrain.trace.steps import (
    AFTER_BACKWARD,
    AT_STEP,
    MOMENTS,
    StepRecord,
    StepRecorder,
    copy_of,
    learning_rates,
)


def run(case: TrainingCase, ctx: CheckContext, folder: Path) -> RankRun:
    """In each rank. Rank 0 leaves weights and gradients in ``folder``, every rank its buffers."""
    return _Run(case, ctx, folder).all_steps()


class _Run:
    def __init__(self, case: TrainingCase, ctx: CheckContext, folder: Path) -> None:
        from pytest_gputrain.checks.session import build_model, build_optimizer, trained_parameters

        self.case, self.ctx, self.folder = case, ctx, folder
        self.peers = Peers()
        self.model = build_model(case, ctx)
        self.wrapped = wrapped_by(case, self.model)
        self.optimizer = build_optimizer(case, self.model, self.wrapped)
        everything = trained_parameters(self.model, self.wrapped, self.optimizer)
        ignored = {canonical_name(n) for n in getattr(self.model, "_ddp_params_and_buffers_to_ignore", ())}
        # Frozen ones may differ as they like; those that train are compared, but for how they start.
        self.ignored = {n for n, p in everything.items() if n in ignored and p.requires_grad}
        self.parameters = {n: p for n, p in everything.items() if n not in ignored or n in self.ignored}
        self.recorder = StepRecorder(self.parameters, self.optimizer)
        self.report = RankRun()
        self._reasons = Reasons(self.peers, self.model, self.wrapped, self.parameters, self.ignored)
        self._buffers: dict[str, Any] | None = None
        self._random_states: list[dict[str, Any]] = []

    def all_steps(self) -> RankRun:
        if not self.peers.all_equal([(n, tuple(p.shape), str(p.dtype)) for n, p in self.parameters.items()]):
            self.report.problem = "the ranks' models have different parameters (names, shapes or types)"
            return self.report
        self.report.problem = self._difference("before the first step")
        with before_forward(lambda: self._holder, self._keep):
            self._take_steps()
        return self.report

    def _take_steps(self) -> None:
        same = []
        for step in range(STEPS):
            if self.report.problem:
                break
            micro_batches, is_same = self._draw(step)
            same.append(is_same)
            self._save("parameters", step, {n: copy_of(p) for n, p in self.parameters.items()})
            record, facts = self._take(step, micro_batches)
            self.report.steps.append(facts)
            self._compare_gradients(step, record, facts)
            self.report.problem = self._not_finite(step, record) or self._difference(
                f"after step {step}", record, micro_batches
            )
        self._save("parameters", STEPS, {n: copy_of(p) for n, p in self.parameters.items()})
        self.report.same_data = bool(same) and all(same)

    @functools.cached_property
    def _holder(self) -> Any:
        """The module whose forward sees the buffers as the step uses them, after DDP's broadcast."""
        own = {id(parameter) for parameter in self.model.parameters()}
        used = {id(parameter) for parameter in self.wrapped.parameters()}
        return self.model if own & used or not used else self.wrapped

    def _keep(self, module: Any) -> None:
        keep_state(self._random_states)
        if self._buffers is None:
            self._buffers = {name: copy_of(buffer) for name, buffer in named_buffers(module).items()}

    def _draw(self, step: int) -> tuple[list[Any], bool]:
        """This rank's micro-batches, and whether all ranks have the same whatever is done."""
        from pytest_gputrain.checks.session import device_of, draw_batch, seed_everything, seed_for

        batch = draw_batch(self.case, self.ctx, step, self.peers.rank)
        same = self._same_everywhere(batch)
        if same:  # it ignores the seed: give each rank its part of one large batch
            seed_everything(seed_for(self.ctx, step))
            whole = self.case.batch(self.ctx.batch_size * self.peers.world_size, device_of(self.ctx))
            try:
                batch = list(self.case.split(whole, self.peers.world_size))[self.peers.rank]
            except Exception:
                return [batch], True
            same = self._same_everywhere(batch)
        return self._micro_batches(batch, step), same

    def _same_everywhere(self, batch: Any) -> bool:
        return self.peers.all_equal([value_digest(leaf) for _, leaf in pytree.leaves(batch)])

    def _micro_batches(self, batch: Any, step: int) -> list[Any]:
        if step != ACCUMULATING_STEP:
            return [batch]
        try:
            parts = list(self.case.split(batch, NUM_MICRO_BATCHES))
        except Exception as error:
            note = f"no step with {NUM_MICRO_BATCHES} micro-batches: split raised {describe(error)}"
            self.report.notes.append(note)
            return [batch]
        return parts

    def _take(self, step: int, micro_batches: list[Any]) -> tuple[StepRecord, StepFacts]:
        import cloudpickle
        import torch

        from pytest_gputrain.checks.session import seed_for, take_step

        # Opaque on the way: the process that runs the check needs not know the user's classes.
        packed = cloudpickle.dumps(pytree.to_device(micro_batches, torch.device("cpu")))
        self._buffers, self._random_states = None, []
        before = {name: copy_of(buffer) for name, buffer in named_buffers(self._holder).items()}
        with self.recorder.step() as record:
            seed = seed_for(self.ctx, step, self.peers.rank)
            take_step(self.case, self.wrapped, self.optimizer, micro_batches, seed)
        self._save_own("buffers", step, before if self._buffers is None else self._buffers)
        self._save_own("random", step, self._random_states)
        return record, StepFacts(packed, len(micro_batches), rates=learning_rates(self.optimizer))

    def _compare_gradients(self, step: int, record: StepRecord, facts: StepFacts) -> None:
        """By parameter, the first moment at which all ranks have the same gradient."""
        digests = {
            moment: digests_of({name: record.gradients[moment].get(name) for name in self.parameters})
            for moment in MOMENTS
        }
        deviating = {moment: self.peers.deviating(digests[moment]) for moment in MOMENTS}
        missing = {
            moment: [name not in record.gradients[moment] for name in self.parameters] for moment in MOMENTS
        }
        for index, name in enumerate(self.parameters):
            agreed = [m for m in MOMENTS if not missing[m][index] and not deviating[m][index]]
            # None on all ranks says little where another moment has one (an optimizer inside backward).
            telling = [m for m in agreed if digests[m][index] != "none"]
            present = any(digests[m][index] != "none" for m in MOMENTS)
            facts.synced[name] = next(iter(telling or ([] if present else agreed)), None)
            both = not missing[AFTER_BACKWARD][index] and not missing[AT_STEP][index]
            if both and digests[AFTER_BACKWARD][index] != digests[AT_STEP][index]:
                facts.processed.append(name)
        at_step = zip(self.parameters, deviating[AT_STEP], missing[AT_STEP], strict=True)
        self._reasons.changed_by_rank = {name for name, ranks, absent in at_step if ranks and not absent}
        self._save("gradients", step, record.gradients)
        for number, update in enumerate(record.updates):
            self._save(f"update-{number}", step, update)

    def _not_finite(self, step: int, record: StepRecord) -> str | None:
        """Why a rank's parameters are no numbers, or None; weights equal in being NaN are no parity."""
        broken = set(not_finite(self.parameters))
        by_name = self.peers.flagged([name in broken for name in self.parameters])
        ranks = {n: ranks for n, ranks in zip(self.parameters, by_name, strict=True) if ranks}
        if not ranks:
            return None
        where = sorted({rank for own in ranks.values() for rank in own})
        everywhere = len(where) == self.peers.world_size
        when = f"after step {step} on {'every rank' if everywhere else f'rank {where[0]}'}"
        gradients = {n for n, g in record.gradients[AT_STEP].items() if not is_finite(g)}
        return in_words(list(ranks), self.parameters, owners(self.model), when, gradients)

    def _difference(
        self, when: str, record: StepRecord | None = None, micro_batches: list[Any] | None = None
    ) -> str | None:
        """Why the ranks' parameters are not equal, or None; the same text on all ranks."""
        deviating = self.peers.deviating(digests_of(self.parameters))
        differing = {n: ranks for n, ranks in zip(self.parameters, deviating, strict=True) if ranks}
        if record is None:
            differing = {n: ranks for n, ranks in differing.items() if n not in self.ignored}
        if not differing:
            return None
        # The one that is furthest off says most; measuring all of them would send the model around.
        sizes = {name: self.peers.distances(self.parameters[name]) for name in list(differing)[:20]}
        name = max(sizes, key=lambda key: max(sizes[key]))
        rank = max(range(self.peers.world_size), key=lambda number: sizes[name][number])
        owned_by = owners(self.model)
        where = f" ({owned_by[name]})" if name in owned_by else ""
        return (
            f"parameters differ across ranks {when}: {name}{where} on rank {rank} is up to "
            f"{sizes[name][rank]:.2g} from rank 0's ({len(differing)} of {len(self.parameters)} parameters)\n"
            f"  likely: {self._reasons.why(differing, record, self.report.steps, micro_batches)}"
        )

    def _save(self, what: str, step: int, tensors: Any) -> None:
        if self.peers.rank == 0:
            self._write(f"{what}-{step}.pt", tensors)

    def _save_own(self, what: str, step: int, tensors: Any) -> None:
        self._write(f"{what}-{step}-{self.peers.rank}.pt", tensors)

    def _write(self, name: str, tensors: Any) -> None:
        import torch

        torch.save(pytree.to_device(tensors, torch.device("cpu")), self.folder / name)
