"""The data of a stability run on one rank: another batch each step, the same one for the same step and seed.

From ``batches()`` where the case has its own, begun anew where it ends; else from ``batch``, the same few
batches over and over, because fresh random ones hold nothing that could be learnt. Before each draw torch's
generator is seeded by step and rank, so that a run that resumes draws what it would have drawn.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from typing import Any

from pytest_gputrain.case import TrainingCase, pytree
from pytest_gputrain.case.returned import stream_of
from pytest_gputrain.checks.context import CheckContext
from pytest_gputrain.checks.result import CheckFailed

NUM_BATCHES = 8
_PART = 2048  # elements of a large tensor that its digest looks at, at either end and in between
_END = object()


class Feed:
    """Batches of steps 1, 2, … on this rank. epochs: how often a stream of the case's own was begun."""

    def __init__(self, case: TrainingCase, ctx: CheckContext, rank: int) -> None:
        self.case, self.ctx, self.rank = case, ctx, rank
        self.epochs = 0
        self.step = 0
        self._stream: Iterator[Any] | None = None

    @property
    def repeats(self) -> bool:
        """Whether a batch depends on the step's number alone."""
        return not self.case.has_own_batches

    def next(self) -> tuple[Any, str]:
        """The batch of the next step, on the device, and its digest. Raises what the case's code raises."""
        from pytest_gputrain.checks.session import device_of, draw_batch, seed_everything, seed_for

        self.step += 1
        if self.repeats:
            batch = draw_batch(self.case, self.ctx, (self.step - 1) % NUM_BATCHES, self.rank)
            return batch, batch_digest(batch)
        seed_everything(seed_for(self.ctx, self.step, self.rank))
        batch = self._draw()
        return pytree.to_device(batch, device_of(self.ctx)), batch_digest(batch)

    def _draw(self) -> Any:
        if self._stream is not None and (batch := next(self._stream, _END)) is not _END:
            return batch
        self.epochs += 1
        self._stream = stream_of(self.case)
        if (batch := next(self._stream, _END)) is _END:
            raise CheckFailed(
                f"batches() gave no batch in epoch {self.epochs} on rank {self.rank}; it has to give the "
                "data of one epoch or more each time it is called"
            )
        return batch

    def forward(self, steps: int, recorded: Mapping[int, str | None]) -> int | None:
        """Run to a step without training. Returns the first step whose batch is not the recorded one."""
        for step in range(1, steps + 1):
            if self.repeats and step > NUM_BATCHES:
                self.step = steps  # the rest are the same batches again
                break
            _, digest = self.next()
            if (was := recorded.get(step)) is not None and was != digest:
                return step
        return None


def batch_digest(batch: Any) -> str:
    """A short name for a batch: all of its small tensors, parts of the large ones."""
    import torch

    from pytest_gputrain.trace.digest import bits, value_digest

    parts = []
    for path, leaf in pytree.leaves(batch):
        parts.append(path.encode())
        if pytree.is_tensor(leaf) and not hasattr(leaf, "full_tensor") and leaf.layout == torch.strided:
            parts += [f"{leaf.dtype}{tuple(leaf.shape)}".encode(), bits(_part(leaf.detach()))]
        else:
            parts.append(value_digest(leaf).encode())
    return hashlib.blake2b(b"".join(parts), digest_size=8).hexdigest()


def _part(tensor: Any) -> Any:
    import torch

    if tensor.numel() <= 4 * _PART:
        return tensor
    flat = tensor.reshape(-1)
    return torch.cat([flat[:_PART], flat[:: flat.numel() // _PART], flat[-_PART:]])


def counted(batch: Any) -> dict[str, Any]:
    """tokens, samples and elements of a batch, as its record has them."""
    tensors = pytree.tensors(batch)
    samples = pytree.batch_length(batch) or 1
    first = next((leaf for leaf in tensors if leaf.dim() == 2 and not leaf.is_floating_point()), None)
    return {
        "tokens": int(first.numel()) if first is not None else samples,
        "samples": samples,
        "elements": sum(int(leaf.numel()) for leaf in tensors),
    }


class Shapes:
    """How many shapes batches have had. A stream may have thousands, of which the first are told apart."""

    _MOST = 10_000

    def __init__(self) -> None:
        self._seen: set[int] = set()

    def count(self, batch: Any) -> int:
        """With this one."""
        if len(self._seen) < self._MOST:
            self._seen.add(hash(tuple(tuple(one.shape) for one in pytree.tensors(batch))))
        return len(self._seen)


def is_masked(batch: Any) -> bool:
    """Whether a leaf of whole numbers is -100 everywhere: targets that cross entropy leaves out."""
    whole = [leaf for leaf in pytree.tensors(batch) if leaf.numel() and not leaf.is_floating_point()]
    return any(bool((leaf == -100).all()) for leaf in whole)
