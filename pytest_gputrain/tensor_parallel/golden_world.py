"""The ranks that a comparison runs on: real ones, of which this process is one, or simulated ones.

Comparisons are written by rank held: a dictionary from rank to plain tensor, of one entry in a real rank and
of all in a simulation. ``merged`` makes a list by rank of such dictionaries, the same everywhere.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol, TypeVar

import torch
from torch import nn

T = TypeVar("T")
Pieces = dict[int, torch.Tensor]


class World(Protocol):
    """size: ranks in all; held: those that this process plays; simulated: whether it plays all of them."""

    size: int
    held: tuple[int, ...]
    simulated: bool

    def pieces(self, tensor: Any) -> Pieces:
        """What each held rank has in memory of this tensor: detached, plain."""

    def whole(self, tensor: Any) -> Pieces:
        """The same, but a DTensor is gathered; a collective of all ranks then."""

    def merged(self, by_rank: Mapping[int, T]) -> list[T]:
        """All ranks' values by rank; a collective."""

    def broadcast(self, tensors: Sequence[torch.Tensor]) -> None:
        """Rank 0's values into everybody's plain tensors; a collective."""

    def alone(self) -> AbstractContextManager[None]:
        """In it one process is all there is: the default group has this rank only."""

    def acting(self) -> AbstractContextManager[None]:
        """In it the parallel model is built, asked and trained: what runs there runs on every rank."""

    def spread(self, model: nn.Module) -> None:
        """Give every held rank its own copy of the parameters and buffers of a plain model, in place."""


class RealWorld:
    """All ranks of the default process group, and a gloo group of its own beside it.

    Its own, so that what a comparison sends is not taken for a collective that the model's code left pending.
    """

    simulated = False

    def __init__(self) -> None:
        import torch.distributed as dist

        self.size = dist.get_world_size()
        self.held: tuple[int, ...] = (dist.get_rank(),)
        self._group = dist.new_group(backend="gloo")
        self._solo = dist.new_group([self.held[0]], use_local_synchronization=True, backend="gloo")

    def pieces(self, tensor: Any) -> Pieces:
        return {self.held[0]: plain(local(tensor))}

    def whole(self, tensor: Any) -> Pieces:
        tensor = tensor.detach()
        return {self.held[0]: plain(tensor.full_tensor() if is_dtensor(tensor) else tensor)}

    def merged(self, by_rank: Mapping[int, T]) -> list[T]:
        import torch.distributed as dist

        gathered: list[Any] = [None] * self.size
        dist.all_gather_object(gathered, by_rank[self.held[0]], group=self._group)
        return gathered

    def broadcast(self, tensors: Sequence[torch.Tensor]) -> None:
        import torch.distributed as dist

        for tensor in tensors:
            sent = tensor.detach().cpu().contiguous()
            dist.broadcast(sent, 0, group=self._group)
            tensor.detach().copy_(sent)

    def alone(self) -> AbstractContextManager[None]:
        return default_group(self._solo)

    def acting(self) -> AbstractContextManager[None]:
        return contextlib.nullcontext()

    def spread(self, model: nn.Module) -> None:
        pass


@contextlib.contextmanager
def default_group(group: Any) -> Iterator[None]:
    """``group`` is the one for whoever names none: what all-reduces in it does so among its ranks."""
    import torch.distributed as dist

    everybody = dist.GroupMember.WORLD
    dist.GroupMember.WORLD = group
    try:
        yield
    finally:
        dist.GroupMember.WORLD = everybody


def is_dtensor(tensor: Any) -> bool:
    from torch.distributed.tensor import DTensor

    return isinstance(tensor, DTensor)


def is_dtensor_class(kind: type[Any]) -> bool:
    from torch.distributed.tensor import DTensor

    return issubclass(kind, DTensor)


def local(tensor: Any) -> Any:
    """This rank's part of a DTensor; any other tensor as it is. Detached."""
    tensor = tensor.detach()
    return tensor.to_local() if is_dtensor(tensor) else tensor


def plain(tensor: Any) -> torch.Tensor:
    """Strided and waited for: an asynchronous collective's result is a tensor class of its own."""
    from torch.distributed._functional_collectives import AsyncCollectiveTensor

    waited = tensor.wait() if isinstance(tensor, AsyncCollectiveTensor) else tensor
    strided: torch.Tensor = waited if waited.layout == torch.strided else waited.to_dense()
    return strided


def world_of(mesh: Any) -> World:
    """The ranks of this process group, or those of the simulation that is on."""
    from pytest_gputrain.tensor_parallel.simulated import simulated_world

    return simulated_world() or RealWorld()
