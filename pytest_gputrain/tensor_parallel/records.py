"""What the golden comparison of a tensor-parallel model found, as plain records. Imports no torch.

Every record is the same on all ranks of a launch: what ranks saw is merged before a record is made. Its
``problem`` is the first line of a failure, ``None`` where nothing is wrong; ``notes`` are worth saying and
no failure.
"""

from __future__ import annotations

from dataclasses import dataclass, field

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Difference:
    """Where two tensors of one shape are farthest apart.

    largest: absolute; index: where; golden, parallel: the two values there; rank: who holds the second.
    relative: norm of the difference over norm of the golden tensor, ``inf`` where that is zero.
    beyond: the largest amount by which an element leaves ``absolute + relative x |golden|`` at tolerance 1.
    """

    largest: float
    index: Shape
    golden: float
    parallel: float
    relative: float
    rank: int = 0

    def __str__(self) -> str:
        return (
            f"Largest absolute diff at {self.index}: Golden={self.golden:.7g}, TP={self.parallel:.7g} "
            f"(rank {self.rank})"
        )


@dataclass(frozen=True)
class WeightRecord:
    """How one parameter of the reference lies on the ranks, found by its content right after parallelizing.

    kind: ``replicated``, ``sharded`` (each position on one rank), ``partly replicated`` (some on several) or
    ``not found``. dim: the dimension it is cut on, in the reference's shape; None where it is whole.
    local_shapes: by rank; () where a rank has none of it. padding: positions of the parallel parameter that
    are no position of the reference. held_as: its names in the parallel model.
    problem: a missing shard, other values than the reference's, or ranks that differ.
    """

    name: str
    shape: Shape
    kind: str
    dim: int | None
    local_shapes: tuple[Shape, ...]
    held_as: tuple[str, ...] = ()
    padding: int = 0
    is_dtensor: bool = False
    problem: str | None = None


@dataclass(frozen=True)
class InputRecord:
    """One input: what the reference and the parallel model made of it.

    input_shape: of the batch's first tensor. output: which of the model's outputs was compared, ``logits``
    or its path. gathered: the dimension on which ranks had parts of it, None where each had all of it.
    nonfinite: NaN and Inf elements in the golden and in the parallel output. losses: by rank.
    """

    input_shape: Shape
    output: str
    golden_shape: Shape
    parallel_shape: Shape
    golden_dtype: str
    parallel_dtype: str
    nonfinite: tuple[int, int]
    difference: Difference | None
    tolerance: float
    golden_loss: float
    losses: tuple[float, ...]
    loss_tolerance: float
    gathered: int | None = None
    problem: str | None = None


@dataclass(frozen=True)
class ForwardRecord:
    """Outputs and losses against the reference's, over several inputs.

    first_layer: where outputs depart first, going forward, and ``first_cause`` why, where that is known.
    """

    world_size: int
    inputs: tuple[InputRecord, ...]
    weights: tuple[WeightRecord, ...]
    simulated: bool = False
    problem: str | None = None
    first_layer: str | None = None
    first_cause: str = ""
    notes: tuple[str, ...] = ()

    @property
    def worst(self) -> float:
        """The largest absolute difference of any output; NaN never wins, it is a problem of its own."""
        return max((one.difference.largest for one in self.inputs if one.difference), default=0.0)

    @property
    def worst_loss(self) -> float:
        """The largest absolute difference of any rank's loss."""
        return max((abs(loss - one.golden_loss) for one in self.inputs for loss in one.losses), default=0.0)


@dataclass(frozen=True)
class GradientRecord:
    """One parameter's gradient. Records come in the order in which the reference's backward reaches them.

    layer: the module that holds the parameter; kind: as in `WeightRecord`. relative: norm of the difference
    over norm of the golden gradient, the worst over ranks; tolerance: what it may be. negligible: the golden
    gradient is nothing but rounding beside the whole (a key's bias before a softmax), so that only a
    difference that matters to the whole counts. cause: what explains a wrong one, ``""`` where nothing does.
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
    passed_by: modules of the plan that were not called, although their weights got gradients.
    """

    layers: tuple[LayerCollectives, ...] = ()
    total: tuple[int, int] = (0, 0)
    why: str = ""
    problem: str | None = None
    passed_by: tuple[str, ...] = ()

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


@dataclass(frozen=True)
class Finding:
    """What makes a comparison worth nothing, or what it could not see.

    where: a module or parameter, "" for the whole. fails: False where it is only worth knowing.
    """

    kind: str
    where: str
    message: str
    figures: dict[str, float] = field(default_factory=dict)
    fails: bool = True

    def __str__(self) -> str:
        return self.message


@dataclass(frozen=True)
class OptimizerResult:
    """One optimizer on both models, from the same weights, over a few steps.

    name: ``Adam``, ``AdamW(fused=True)``, ``the case's optimizer``. relative: the worst parameter's
    difference between the two updates over the norm of the golden one, without elements whose gradient is
    rounding; of weights and not of updates where their precision is too short. skipped: why it was not run.
    """

    name: str
    steps: int
    relative: float
    tolerance: float
    parameter: str = ""
    difference: Difference | None = None
    golden_losses: tuple[float, ...] = ()
    losses: tuple[float, ...] = ()
    skipped: str = ""
    problem: str | None = None


@dataclass(frozen=True)
class StepRecord:
    """The gradients that reach the optimizer in the case's own step, after whatever the step does to them.

    scale: what they were multiplied by in backward, so that a clipping step clips.
    """

    scale: float
    gradients: tuple[GradientRecord, ...]
    problem: str | None = None


@dataclass(frozen=True)
class OptimizerRecord:
    """results: by optimizer; steps: of the case's own step, empty where the case has none."""

    world_size: int
    results: tuple[OptimizerResult, ...]
    weights: tuple[WeightRecord, ...]
    steps: tuple[StepRecord, ...] = ()
    simulated: bool = False
    problem: str | None = None
    notes: tuple[str, ...] = ()

    @property
    def worst(self) -> float:
        return max((one.relative for one in self.results if not one.skipped), default=0.0)


@dataclass(frozen=True)
class Share:
    """How much of a parameter or of a layer each rank holds. total, local: elements, local by rank.

    copies: how many ranks hold the same as each other in all, which data parallelism asks for.
    """

    name: str
    total: int
    local: tuple[int, ...]
    kind: str = ""
    copies: int = 1

    @property
    def overhead(self) -> float:
        """(held by the ranks of one copy - total) / total: 0 where each element is on one rank."""
        return (sum(self.local) / self.copies - self.total) / self.total if self.total else 0.0

    @property
    def imbalance(self) -> float:
        """(most - least) / mean over ranks."""
        mean = sum(self.local) / len(self.local)
        return (max(self.local) - min(self.local)) / mean if mean else 0.0


@dataclass(frozen=True)
class Accounting:
    """What tensor parallelism saves. whole: all parameters; sharded: those that are cut; both as `Share`.

    layers: by transformer block, else by module. parameter_bytes: by rank, of the memory behind its
    parameters, which is more than they need where they are views. measured_bytes: by rank, by how much what
    is alive grew when the parallel model was made; empty in a simulation. total_bytes: of the reference.
    """

    world_size: int
    whole: Share
    sharded: Share
    layers: tuple[Share, ...]
    parameters: tuple[Share, ...]
    total_bytes: int
    parameter_bytes: tuple[int, ...]
    measured_bytes: tuple[int, ...] = ()
    simulated: bool = False
    problem: str | None = None
    notes: tuple[str, ...] = ()

    @property
    def overhead(self) -> float:
        return self.whole.overhead

    @property
    def largest_replicated(self) -> Share | None:
        held = [one for one in self.parameters if one.kind == "replicated"]
        return max(held, key=lambda one: one.total) if held else None


@dataclass(frozen=True)
class CheckpointRecord:
    """Saved, resharded and loaded by ``torch.distributed.checkpoint``, both ways.

    to_one: tensors compared after loading the ranks' checkpoint into a plain model; to_ranks: after loading a
    plain model's checkpoint into the ranks'. saved_bytes: of the ranks' checkpoint. skipped: why it was not
    done.
    """

    world_size: int
    to_one: int = 0
    to_ranks: int = 0
    saved_bytes: int = 0
    skipped: str = ""
    problem: str | None = None
    notes: tuple[str, ...] = ()
