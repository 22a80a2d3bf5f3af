"""Random numbers where ranks have different activations: each rank draws its own, and afterwards all draw
alike.

Dropout on replicated activations has to be the same on all ranks, or they go apart; on divided heads, or on
parts of a sequence, it has to differ, or samples drop the same units in every part. So the generator is
seeded by rank while such a part is computed, and set back. Where nothing is drawn meanwhile, the stream of
random numbers is untouched.
"""

from __future__ import annotations

import zlib
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

_APART = 1_000_003  # seeds of neighbouring ranks and regions are far from each other


def drops(module: nn.Module) -> bool:
    """Whether there is dropout below: a Dropout module, or an attribute with its rate, as libraries keep
    it.
    """
    for below in module.modules():
        if isinstance(below, nn.modules.dropout._DropoutNd) and below.p > 0:
            return True
        rates = (value for name, value in vars(below).items() if "dropout" in name or "pdrop" in name)
        if any(isinstance(rate, float) and rate > 0 for rate in rates):
            return True
    return False


class Region:
    """From ``begin`` to ``end`` the default generator of the mesh's device is this rank's own.

    number: different for each region of a model, so that none repeats another's numbers.
    """

    def __init__(self, mesh: DeviceMesh, number: int) -> None:
        self.mesh, self.number = mesh, number
        self.before: Tensor | None = None
        self.seeded: Tensor | None = None

    def begin(self) -> None:
        from pytest_gputrain.tensor_parallel.simulated import simulated_world

        if simulated_world() is not None:
            return  # one process plays all ranks: there is no own generator
        self.before = self._state()
        # From the state, not drawn from it: a model without active dropout goes on with the same numbers.
        seed = zlib.crc32(self.before.numpy().tobytes()) + _APART * (
            self.number * self.mesh.size() + self.mesh.get_local_rank()
        )
        self._generator().manual_seed(seed)
        self.seeded = self._state()

    def end(self) -> None:
        if self.before is None or self.seeded is None:
            return
        drawn = not torch.equal(self._state(), self.seeded)
        self._generator().set_state(self.before)
        if drawn:  # on all ranks or on none: the next step must not begin where this one did
            torch.rand(1, device=self.mesh.device_type)
        self.before = self.seeded = None

    def _state(self) -> Tensor:
        state: Tensor = self._generator().get_state()
        return state

    def _generator(self) -> torch.Generator:
        if self.mesh.device_type == "cuda":
            return torch.cuda.default_generators[torch.cuda.current_device()]
        return torch.default_generator


def surround(first: nn.Module, last: nn.Module, region: Region, *, within: bool) -> None:
    """Begin the region with ``first`` and end it with ``last``, in training.

    within: what draws lies between the two (a column and a row layer); else both are in it (layers).
    """

    def begin(module: nn.Module, *_: Any) -> None:
        if module.training:
            region.begin()

    def end(*_: Any) -> None:
        region.end()

    if within:
        first.register_forward_hook(begin)
        last.register_forward_pre_hook(end)
    else:
        first.register_forward_pre_hook(begin)
        last.register_forward_hook(end)
