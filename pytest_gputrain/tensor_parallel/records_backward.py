"""What a backward pass of both models came to: gradients, layers and collectives, as plain records.

The same on all ranks, as those of ``records``. Imports no torch.
"""

from __future__ import annotations

from dataclasses import dataclass

from pytest_gputrain.tensor_parallel.records import Difference, InputRecord, WeightRecord


@dataclass(frozen=True)
class GradientRecord:
    """One parameter's gradient. Records come in the order in which the reference's backward reaches them.

    layer: the module that holds the parameter; kind: as in `WeightRecord`. relative: norm of the difference
    over norm of the golden gradient, the worst over ranks; tolerance: what it may be. negligible: the golden
    gradient is nothing but rounding beside the whole (a key's bias before a softmax), so that only a
    difference that matters to the whole counts. cause: what explains a wrong one, ``""`` where nothing does.
    factors: by rank, k where the found gradient is k times the golden one, None where it is no multiple.
    """

    name: str
    layer: str
    kind: str
    relative: float
    tolerance: float
    by_rank: tuple[float, ...] = ()
    difference: Difference | None = None
    negligible: bool = False
    problem: str | None = None
    cause: str = ""
    factors: tuple[float | None, ...] = ()


@dataclass(frozen=True)
class LayerRecord:
    """One module on the way back: how far its output's and its input's gradient are from the reference's.

    None where they cannot be compared (a sharded activation of a hand-written layer).
    """

    name: str
    output_gradient: float | None
    input_gradient: float | None
    cause: str = ""


@dataclass(frozen=True)
class LayerCollectives:
    """Collectives of one layer in one step, by kind, and what its plan predicts of them.

    may: how many more backward the plan leaves open.
    """

    layer: str
    forward: dict[str, int]
    backward: dict[str, int]
    planned_forward: dict[str, int]
    planned_backward: dict[str, int]
    may: int = 0

    @property
    def absent(self) -> bool:
        """None at all in a direction in which the plan predicts some: it was not carried out."""
        return bool(
            (self.planned_forward and not self.forward) or (self.planned_backward and not self.backward)
        )

    @property
    def departs(self) -> bool:
        more = sum(self.backward.values()) - sum(self.planned_backward.values())
        fewer = any(self.backward.get(kind, 0) < count for kind, count in self.planned_backward.items())
        return self.forward != self.planned_forward or fewer or more > self.may

    def text(self) -> str:
        """In one line, what was made and what was predicted, in the direction that departs first."""
        way, made, planned = "forward", self.forward, self.planned_forward
        if made == planned:
            way, made, planned = "backward", self.backward, self.planned_backward
        return f"{self.layer} makes {_counted(made)} {way}, where the plan says {_counted(planned)}"


def _counted(kinds: dict[str, int]) -> str:
    return " + ".join(f"{count} {kind}" for kind, count in sorted(kinds.items())) or "no collective"


@dataclass(frozen=True)
class CommunicationRecord:
    """One step's collectives. layers: those that the plan predicts. total: forward and backward, of all.

    why: what kept them from being predicted. problem: a layer in which the plan was not carried out.
    passed_by: modules of the plan that were not called, although their weights got gradients. elsewhere: of
    groups that are not the plan's (data parallel's); in nothing else here. early: those that are read before
    they are waited for, a line each.
    """

    layers: tuple[LayerCollectives, ...] = ()
    total: tuple[int, int] = (0, 0)
    why: str = ""
    problem: str | None = None
    passed_by: tuple[str, ...] = ()
    elsewhere: int = 0
    early: tuple[str, ...] = ()

    @property
    def departing(self) -> tuple[LayerCollectives, ...]:
        return tuple(one for one in self.layers if one.departs)

    def told(self) -> list[str]:
        """A line each of what is not as the plan says."""
        lines = [
            f"{name} is in the plan, but its weights are used without calling it: none of the plan's "
            "collectives is made there"
            for name in self.passed_by
        ]
        return [*lines, *(one.text() for one in self.departing)]

    def __str__(self) -> str:
        made = f"{self.total[0]} forward, {self.total[1]} backward"
        if self.elsewhere:
            made += f", {self.elsewhere} in other groups than the plan's"
        if self.why or not self.layers:
            return f"{made}; {self.why or 'none of them could be predicted'}"
        right = len(self.layers) - len(self.departing)
        return f"{made}; as the plan says in {right} of {len(self.layers)} layers"


@dataclass(frozen=True)
class BackwardRecord:
    """Every parameter's gradient against the reference's.

    first_layer: where gradients depart first, going backward, and ``first_cause`` why, where that is known.
    communication: collectives beside the plan's.
    not_compared: trainable parameters of the reference whose gradient could not be compared, with the reason.
    """

    world_size: int
    forward: InputRecord
    gradients: tuple[GradientRecord, ...]
    weights: tuple[WeightRecord, ...]
    layers: tuple[LayerRecord, ...] = ()
    not_compared: tuple[tuple[str, str], ...] = ()
    first_layer: str | None = None
    first_cause: str = ""
    communication: CommunicationRecord | None = None
    simulated: bool = False
    problem: str | None = None
    notes: tuple[str, ...] = ()

    @property
    def wrong(self) -> tuple[GradientRecord, ...]:
        return tuple(one for one in self.gradients if one.problem)

    @property
    def worst(self) -> float:
        """The largest relative error of a gradient that is not negligible."""
        return max((one.relative for one in self.gradients if not one.negligible), default=0.0)
