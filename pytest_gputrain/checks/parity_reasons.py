"""Why ranks that should be equal are not: what the rank's own records of its steps tell."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from pytest_gputrain.checks.parity import StepFacts
from pytest_gputrain.checks.peers import Peers
from pytest_gputrain.launch.output import rank_list
from pytest_gputrain.trace.steps import AFTER_BACKWARD, StepRecord


@dataclass
class Reasons:
    """Of one rank. ignored: parameters that data parallel leaves out.

    changed_by_rank: in the last step, those whose gradients differ between ranks when the optimizer steps.
    """

    peers: Peers
    model: Any
    wrapped: Any
    parameters: Mapping[str, Any]
    ignored: set[str]
    changed_by_rank: set[str] = field(default_factory=set)

    def why(
        self,
        differing: Mapping[str, list[int]],
        record: StepRecord | None,
        steps: Sequence[StepFacts],
        micro_batches: Sequence[Any] | None,
    ) -> str:
        """What is likely behind parameters that differ. Every rank calls it, for some reasons are asked for.

        record: of the last of ``steps``, None before the first.
        """
        if set(differing) <= self.ignored:
            return (
                "they are in the model's _ddp_params_and_buffers_to_ignore, so each rank trains its own; if "
                "that is meant (expert parallelism), put ddp_parity in the case's expected_failures"
            )
        if record is None:
            return "the ranks start from different weights, and wrap does not broadcast rank 0's"
        if not any(moment is None for name, moment in steps[-1].synced.items() if name in differing):
            return self._after_backward(differing, record)
        unused = [name for name, gradient in record.gradients[AFTER_BACKWARD].items() if gradient is None]
        unused = [name for name in unused if self.parameters[name].requires_grad]
        if unused and hasattr(self.wrapped, "find_unused_parameters"):
            return (
                f"{', '.join(unused[:3])} got no gradient, so DistributedDataParallel never finished its "
                "reduction and each rank kept its own gradients; it raises in the next step"
            )
        if micro_batches is not None and len(micro_batches) > 1:
            return (
                f"gradients are not synchronised in the step with {len(micro_batches)} micro-batches: "
                "no_sync has to end before the last one's forward"
            )
        which = "their gradients" if len(differing) < len(self.parameters) else "gradients"
        earlier = steps[:-1]
        if earlier and all(facts.synced[name] is not None for facts in earlier for name in differing):
            return f"{which} are averaged over ranks at first, and no more from step {len(earlier)} on"
        return f"{which} are not averaged over ranks{self._never(differing)}"

    def _after_backward(self, differing: Mapping[str, list[int]], record: StepRecord) -> str:
        """Where the ranks have agreed on gradients before."""
        skips = self.peers.flagged([record.optimizer_steps == 0])[0]
        if 0 < len(skips) < self.peers.world_size:
            verb = "leaves" if len(skips) == 1 else "leave"
            return (
                f"{rank_list(skips)} {verb} the optimizer's step out where the others take it, as by a "
                "condition on the rank's own loss, norm or batch; decide it on all ranks together "
                "(all_reduce it)"
            )
        if set(differing) & self.changed_by_rank:
            return (
                "the gradients agree at first, and no more when the optimizer steps: each rank changes its "
                "own in between (noise, a norm of its own, a mask)"
            )
        return (
            "the gradients agree, so the update itself differs: learning rate, weight decay or optimizer "
            "state is not the same on all ranks, or weights are changed outside the optimizer"
        )

    def _never(self, differing: Mapping[str, list[int]]) -> str:
        if self.wrapped is self.model:
            return ": wrap returns the bare model"
        inside = {id(parameter) for parameter in self.wrapped.parameters()}
        if all(id(self.parameters[name]) not in inside for name in differing):
            return ": they are outside the wrapped model"
        if len(differing) == len(self.parameters):
            return ": the step trains around the wrapper (model.module(...)), or the wrapper does not average"
        return ""
