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
