"""How to reach a global batch size with the batch that fits: micro-batches, accumulation steps, ranks.

Every rank takes the same number of samples an optimizer step, because DDP averages the ranks' gradients with
equal weight. So the global batch has to be a multiple of the world size; everything else can be exact.

A rank's samples go into equal micro-batches where that costs at most half as many steps again as the fewest:
equal shapes compile once, and dividing each loss by the number of steps is right for them. Otherwise there
are as few steps as fit, all of one size but for a smaller last one; a mean loss then has to be weighted by
``weights``.
"""

from __future__ import annotations

from dataclasses import dataclass

from pytest_gputrain.batch.ladder import whole

# 100 samples in micro-batches of at most 16 are 10 x 10 rather than 6 x 15 + 10: 10 steps instead of 7.
# Beyond this, steps cost more than a second shape does: 97 samples would be 97 micro-batches.
EQUAL_MAY_COST = 1.5


@dataclass(frozen=True)
class AccumulationPlan:
    """One optimizer step on each rank: ``accumulation_steps`` micro-batches of ``device_batch_size`` samples.

    The last one has ``last_micro_batch`` samples, fewer where the plan ``is_ragged``. ``target`` is the
    global batch size asked for. Prints as ``Micro-batch: 16, Grad accum: 4, Effective: 64``.
    """

    device_batch_size: int
    accumulation_steps: int
    last_micro_batch: int
    world_size: int
    target: int

    @property
    def samples_per_rank(self) -> int:
        """Samples that each rank takes in an optimizer step."""
        return self.device_batch_size * (self.accumulation_steps - 1) + self.last_micro_batch

    @property
    def global_batch_size(self) -> int:
        """Samples that all ranks together take in an optimizer step."""
        return self.samples_per_rank * self.world_size

    @property
    def is_exact(self) -> bool:
        """Whether the global batch is the one asked for."""
        return self.global_batch_size == self.target

    @property
    def is_ragged(self) -> bool:
        """Whether the last micro-batch is smaller than the others."""
        return self.last_micro_batch != self.device_batch_size

    def micro_batches(self) -> tuple[int, ...]:
        """Return the samples of each micro-batch of a rank, in order."""
        return (self.device_batch_size,) * (self.accumulation_steps - 1) + (self.last_micro_batch,)

    def weights(self) -> tuple[float, ...]:
        """Return by what to multiply each micro-batch's mean loss, for the gradients of the mean over all."""
        return tuple(size / self.samples_per_rank for size in self.micro_batches())

    def __str__(self) -> str:
        said = (
            f"Micro-batch: {self.device_batch_size}, Grad accum: {self.accumulation_steps}, "
            f"Effective: {self.global_batch_size}"
        )
        said += f", Last micro-batch: {self.last_micro_batch}" if self.is_ragged else ""
        said += f", Ranks: {self.world_size}" if self.world_size > 1 else ""
        return said + ("" if self.is_exact else f", Target: {self.target}")


def plan_accumulation(
    global_batch_size: int, max_device_batch_size: int, world_size: int = 1, *, exact: bool = True
) -> AccumulationPlan:
    """Plan one optimizer step of ``global_batch_size`` samples on ``world_size`` ranks.

    No micro-batch is above ``max_device_batch_size`` samples. Raises ``ValueError`` when a number is no
    positive whole one, or the ranks cannot share the batch equally; with ``exact=False`` the nearest batch
    that they can share is planned, the smaller of two equally near.
    """
    target = whole("global_batch_size", global_batch_size)
    limit = whole("max_device_batch_size", max_device_batch_size)
    ranks = whole("world_size", world_size)
    planned = _nearest(target, ranks)[0]
    if planned != target and exact:
        raise ValueError(_not_shared(target, ranks))
    samples = planned // ranks
    device_batch_size, steps = _split(samples, limit)
    last = samples - device_batch_size * (steps - 1)
    return AccumulationPlan(device_batch_size, steps, last, ranks, target)


def _split(samples: int, limit: int) -> tuple[int, int]:
    """Return size and number of the micro-batches of one rank, the last of which may be smaller."""
    fewest = -(-samples // limit)
    for steps in range(fewest, int(EQUAL_MAY_COST * fewest) + 1):
        if samples % steps == 0:
            return samples // steps, steps
    return -(-samples // fewest), fewest


def _nearest(target: int, ranks: int) -> list[int]:
    """The one or two batches next to ``target`` that the ranks can share equally, the nearest first."""
    below = target // ranks * ranks
    near = {size for size in (below, -(-target // ranks) * ranks) if size > 0}
    return sorted(near, key=lambda size: (abs(size - target), size))


def _not_shared(target: int, ranks: int) -> str:
    near = _nearest(target, ranks)
    choice = " or ".join(str(size) for size in sorted(near))
    return (
        f"a global batch of {target} cannot be shared equally by {ranks} ranks ({target} / {ranks} = "
        f"{target / ranks:.2f} samples); take {choice} (exact=False takes {near[0]})"
    )
