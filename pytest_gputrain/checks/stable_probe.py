"""The loss of a few batches before training and after it, with the noise of a stream left out."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from statistics import fmean
from typing import Any

from pytest_gputrain.checks.result import CheckOutcome
from pytest_gputrain.checks.stable_data import NUM_BATCHES, Feed

AGAIN = 8  # passes over these batches alone


class Probe:
    """The loss of a few batches, always with the same random numbers; weights and buffers stay as they are.

    The batches are the first of the run's own. problem: why there is no loss, in words.
    """

    def __init__(self, run: Any) -> None:
        self.run, self.problem = run, ""
        feed = Feed(run.case, run.ctx, run.peers.rank)
        self.batches = [feed.next()[0] for _ in range(NUM_BATCHES)]
        self.first_buffers = {name: one.detach().clone() for name, one in run.wrapped.named_buffers()}

    def losses(self, *, with_first_buffers: bool = False) -> list[float]:
        """A collective, as the forward is.

        with_first_buffers: a model may count steps in a buffer, by which its loss becomes another one.
        """
        from pytest_gputrain.case import pytree

        run, found = self.run, []
        if self.problem:
            return []
        buffers = {name: one.clone() for name, one in run.wrapped.named_buffers()}
        if with_first_buffers:
            self._put(self.first_buffers)
        try:
            for number, batch in enumerate(self.batches):
                found.append(self._loss(pytree.map_tensors(torch_clone, batch), number))
        except CheckOutcome:
            raise
        except Exception as error:  # a loss that needs gradients, or a step that is not made of this loss
            self.problem = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"[:200]
        self._put(buffers)
        if run.peers.any_rank(bool(self.problem)):
            self.problem = self.problem or "another rank could not"
            return []
        return found

    def _put(self, buffers: dict[str, Any]) -> None:
        import torch

        with torch.no_grad():
            for name, one in self.run.wrapped.named_buffers():
                if name in buffers and buffers[name].shape == one.shape:
                    one.copy_(buffers[name])

    def _loss(self, batch: Any, number: int) -> float:
        import torch

        try:
            with torch.no_grad():
                value = self._value(batch, number)
        except RuntimeError:  # a loss that asks for gradients itself, as a penalty on them does
            with getattr(self.run.wrapped, "no_sync", contextlib.nullcontext)():
                value = self._value(batch, number)
        if value is None:
            raise ValueError("loss(model, batch) gave no number")
        return value

    def _value(self, batch: Any, number: int) -> float | None:
        from pytest_gputrain.checks.session import loss_value, seed_everything, seed_for

        run = self.run
        seed_everything(seed_for(run.ctx, number, run.peers.rank))
        return loss_value(run.case.loss(run.wrapped, batch))

    def stands_still(self, before: list[float], after: list[float]) -> bool:
        """A collective: whether the mean did not fall on any rank."""
        fell = not before or not after or fmean(after) < fmean(before)
        return bool(self.run.peers.any_rank(not fell))

    def trained_on_alone(self) -> list[float]:
        """Some more steps of the run's own loop, on these batches only: a stream may teach nothing."""
        from pytest_gputrain.case import pytree
        from pytest_gputrain.checks.session import seed_for, take_step

        run = self.run
        for number in range(AGAIN * NUM_BATCHES):
            batch = pytree.map_tensors(torch_clone, self.batches[number % NUM_BATCHES])
            seed = seed_for(run.ctx, number, run.peers.rank)
            take_step(run.case, run.wrapped, run.optimizer, [batch], seed)
        return self.losses()


def of_steps(losses: Sequence[float | None]) -> tuple[list[float], list[float]]:
    """Losses of the first pass over repeated batches and of the last, as the steps gave them."""
    whole = len(losses) // NUM_BATCHES * NUM_BATCHES
    first, last = losses[:NUM_BATCHES], losses[whole - NUM_BATCHES : whole]
    if whole < 2 * NUM_BATCHES or None in first or None in last:
        return [], []
    return [loss for loss in first if loss is not None], [loss for loss in last if loss is not None]


def torch_clone(tensor: Any) -> Any:
    return tensor.clone()
