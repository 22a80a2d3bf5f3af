"""World sizes that this machine has no cores for, simulated in one process. Real ranks remain the proof.

    with simulated(8) as mesh:
        record = compare_backward(case, mesh)     # record.simulated is True

By torch's local-tensor mode, where it exists: every tensor of the parallel model holds what each rank would
have, every operation runs once a rank, and a collective is computed from the parts. Python code runs once
for all ranks, so a model whose code asks for its rank (a hand-written column layer that cuts its own shard)
cannot be simulated, and is refused. Importing this module imports no torch.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pytest_gputrain.tensor_parallel.golden_world import World

_current: list[World] = []


class SimulationError(RuntimeError):
    """This cannot be simulated; one line, with the way out. Nothing is wrong with the model."""


def simulated_world() -> World | None:
    """The simulation that is on, None outside of one."""
    return _current[-1] if _current else None


@contextmanager
def simulated(world_size: int) -> Iterator[Any]:
    """A CPU mesh ("tp",) of ``world_size`` simulated ranks, on which comparisons run in this process.

    Raises SimulationError where torch has no local-tensor mode, or when the model asks for its rank.
    """
    if world_size < 2:
        raise ValueError(f"world_size is {world_size}; simulate 2 ranks or more")
    from pytest_gputrain.tensor_parallel.local_ranks import SimulatedWorld, simulated_mesh

    with simulated_mesh(world_size) as (mesh, group):
        _current.append(SimulatedWorld(world_size, group))
        try:
            yield mesh
        finally:
            _current.pop()
