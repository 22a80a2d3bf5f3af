"""A reference and its parallel counterpart, in the one order in which the reference stays independent.

``Pair(case, mesh)`` builds the reference; ask it all there is to ask; ``parallelize()`` then builds the other
one from the same weights, and asks the reference once more, which must still answer the same.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from pytest_gputrain.case import TrainingCase, pytree
from pytest_gputrain.tensor_parallel import golden_difference as apart
from pytest_gputrain.tensor_parallel.apply import apply
from pytest_gputrain.tensor_parallel.golden_inputs import draw
from pytest_gputrain.tensor_parallel.golden_likely import tell
from pytest_gputrain.tensor_parallel.golden_model import (
    SEED,
    ComparisonError,
    build,
    copy_weights,
    device_of,
    shake,
    storages,
)
from pytest_gputrain.tensor_parallel.golden_outputs import Answer, ask
from pytest_gputrain.tensor_parallel.golden_styles import (
    Applied,
    learning,
    not_there,
    refuse_whole_inputs,
    skipping,
)
from pytest_gputrain.tensor_parallel.golden_weights import Weights, find_weights
from pytest_gputrain.tensor_parallel.golden_world import World, world_of
from pytest_gputrain.trace.digest import tensor_digest


class Pair:
    """reference: one process's model, moved off its initial values; parallel: after ``parallelize()``.

    applied: the styles that parallelize gave to modules, where it did so by ``ParallelStyle``.
    short: the short type that the reference's modules answer in, as under autocast; None where there is none.
    notes: what a reader should know and is no failure. problem: what makes the pair itself wrong.
    Raises ComparisonError where there is nothing to compare.
    """

    parallel: nn.Module
    weights: Weights
    applied: list[Applied]

    def __init__(self, case: TrainingCase, mesh: Any, *, seed: int = SEED) -> None:
        if case.parallelize is None:
            raise ComparisonError("no tensor-parallel plan given: TrainingCase(parallelize=...)")
        self.case, self.mesh, self.seed = case, mesh, seed
        self.device = device_of(mesh)
        self.world: World = world_of(mesh)
        self.notes: list[str] = []
        self.problem: str | None = None
        self.short: torch.dtype | None = None
        with self.world.alone():
            self.reference = build(case, self.device, seed)
            shake(self.reference, seed)
            self._equal_on_all_ranks()

    def _equal_on_all_ranks(self) -> None:
        """A model() that draws from somewhere else differs between ranks: rank 0's weights count then."""
        tensors = [*self.reference.state_dict().values()]
        tensors = [tensor for tensor in tensors if isinstance(tensor, torch.Tensor)]
        digests = [tensor_digest(tensor) for tensor in tensors]
        if len({tuple(one) for one in self.world.merged(dict.fromkeys(self.world.held, digests))}) > 1:
            self.notes.append("model() gives other weights on other ranks under one seed: rank 0's were used")
            self.world.broadcast(tensors)

    def reference_batch(self, rows: int = 2) -> Any:
        """A batch of the case's own length, the same on all ranks."""
        with self.world.alone():
            return draw(self.case, rows, self.device, self.seed)

    def expect_same(self, batches: Sequence[Any]) -> None:
        """Sets ``problem`` where ranks drew different batches, which values alone do not say; collective."""
        digests = [tensor_digest(tensor) for batch in batches for tensor in pytree.tensors(batch)]
        drawn = self.world.merged(dict.fromkeys(self.world.held, digests))
        other = next((rank for rank, one in enumerate(drawn) if one != drawn[0]), None)
        if other is not None:
            self.problem = self.problem or (
                f"rank {other} draws other batches than rank 0 under one seed; the ranks of a "
                "tensor-parallel group work on one batch: do not draw by rank, or broadcast rank 0's"
            )

    def ask_reference(self, batch: Any, *, gradients: bool = False) -> Answer:
        with self.world.alone():
            answer = ask(self.case, self.reference, batch, self.seed, gradients=gradients)
        self.short = self.short or next((kind for kind in apart.SHORT if kind in answer.kinds), None)
        return answer

    def computes_in(self, dtype: torch.dtype) -> torch.dtype:
        """What values of this type are computed in: a shorter one, where autocast or a cast makes it so."""
        return self.short or dtype

    def ask_parallel(self, batch: Any, *, gradients: bool = False) -> Answer:
        try:
            with self.world.acting():
                return ask(self.case, self.parallel, batch, self.seed, gradients=gradients)
        except RuntimeError as error:
            tell(error, self.reference, self.world.size)
            raise

    def parallelize(self) -> nn.Module:
        """The parallel model, of the reference's weights at the moment of the call."""
        batch = self.reference_batch(1)
        before = self._quietly(batch)
        with self.world.alone():
            model = self._counterpart()
        with self.world.acting():
            self.world.spread(model)
            names = {id(module): name for name, module in model.named_modules()}
            with learning(names) as self.applied, skipping() as skipped:
                self.parallel = apply(self.case, model, self.mesh)
        self.problem = self.problem or not_there(skipped, self.reference)
        refuse_whole_inputs(self.applied, self.parallel)
        # What training would go on from: nothing that is seeded after this says what ranks do on their own.
        self.random_state = torch.get_rng_state()
        self._check_independence()
        self.weights = find_weights(self.reference, self.parallel, self.world)
        self._check_reference(before, self._quietly(batch))
        return self.parallel

    def _counterpart(self) -> nn.Module:
        """A second model of the case with the reference's weights, and none of its memory."""
        model = build(self.case, self.device, self.seed)
        if model is self.reference or storages(model) & storages(self.reference):
            self.notes.append("model() returns the same object each time: a copy of it was made parallel")
            # The copy is the parallel one: hooks and closures stay with the reference, which runs as it was.
            return copy.deepcopy(self.reference)
        copy_weights(self.reference, model)
        return model

    def _check_independence(self) -> None:
        if self.parallel is self.reference or storages(self.parallel) & storages(self.reference):
            self.problem = (
                "the parallel model shares memory with the reference, so that nothing can be compared: "
                "parallelize takes weights from a model that it keeps somewhere"
            )

    def _quietly(self, batch: Any) -> Answer | None:
        """An answer without gradients; None where the model does not take this batch."""
        try:
            return self.ask_reference(batch)
        except Exception:
            return None

    def _check_reference(self, before: Answer | None, after: Answer | None) -> None:
        if before is None or not before.outputs:
            return
        kind = before.outputs[0][1].dtype
        allowed = apart.tolerance(apart.OUTPUT_TOLERANCE, kind)
        if (
            after is not None
            and [one.shape for _, one in after.outputs] == [one.shape for _, one in before.outputs]
            and all(
                apart.excess(old, new, allowed) <= allowed
                for (_, old), (_, new) in zip(before.outputs, after.outputs, strict=True)
            )
        ):
            return
        self.problem = self.problem or (
            "after parallelize a model that was not given to it computes something else: it changes classes "
            "or functions of the whole process (nn.Linear.forward, a library's attention function); "
            "change the modules of the given model instead"
        )

    def output_shape(self, batch: Any) -> tuple[int, ...]:
        """Of the reference's main output; () where it has none."""
        outputs = self.ask_reference(batch).outputs
        return tuple(outputs[0][1].shape) if outputs else ()
