"""How long a run is: optimizer steps, or tokens that it sees exactly, its last step cut to fit."""

from __future__ import annotations

from dataclasses import dataclass

from pytest_gputrain import AccumulationPlan, plan_accumulation
from pytest_gputrain.reference.train_arguments import TrainUsageError
from pytest_gputrain.reference.train_options import Options


@dataclass(frozen=True)
class Length:
    """plan: a step; last_plan: the last one, smaller where tokens do not come out even.

    sample_tokens: tokens of a sample.
    """

    steps: int
    plan: AccumulationPlan
    last_plan: AccumulationPlan
    sample_tokens: int

    @property
    def tokens(self) -> int:
        """Tokens that the run sees, over all ranks."""
        return self.tokens_until(self.steps)

    def plan_of(self, number: int) -> AccumulationPlan:
        """The plan of step ``number``, from 1."""
        return self.last_plan if number == self.steps else self.plan

    def tokens_of(self, number: int) -> int:
        """Tokens of step ``number``, over all ranks."""
        return self.plan_of(number).global_batch_size * self.sample_tokens

    def tokens_until(self, number: int) -> int:
        """Tokens of the steps up to ``number``, it included."""
        before = (number - 1) * self.plan.global_batch_size * self.sample_tokens
        return before + self.tokens_of(number)


def length_of(options: Options, plan: AccumulationPlan, sample_tokens: int) -> Length:
    """Raises TrainUsageError for fewer tokens than a sample on each rank."""
    if options.tokens is None:
        return Length(options.steps, plan, plan, sample_tokens)
    ranks = plan.world_size
    samples = options.tokens // sample_tokens // ranks * ranks
    if not samples:
        raise TrainUsageError(
            f"--tokens {options.tokens} is less than a sample of {sample_tokens} on each of {ranks} ranks; "
            f"give {ranks * sample_tokens} or more"
        )
    steps = -(-samples // plan.global_batch_size)
    left = samples - (steps - 1) * plan.global_batch_size
    # Within the micro-batch of the other steps, which is known to fit.
    return Length(steps, plan, plan_accumulation(left, plan.device_batch_size, ranks), sample_tokens)
