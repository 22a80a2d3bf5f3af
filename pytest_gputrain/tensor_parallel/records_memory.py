"""How much of a model each rank holds, as plain records.

The same on all ranks, as those of ``records``. Imports no torch.
"""

from __future__ import annotations

from dataclasses import dataclass


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
