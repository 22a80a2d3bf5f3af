"""World sizes that this machine has no cores for, in one process. Not there yet."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pytest_gputrain.tensor_parallel.golden_world import World


def simulated_world() -> World | None:
    """The simulation that is on, None outside of one."""
    return None
