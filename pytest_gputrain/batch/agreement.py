"""Ranks that decide together: what one has found out, all know, and a rank that fails tells the others.

Every step is one exchange in which each rank takes part, whatever became of its own work, so that none waits
for a rank that has left. A rank that dies is reported by the process group. Imports no torch at the top.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from pytest_gputrain.case.loading import describe

if TYPE_CHECKING:
    import torch

T = TypeVar("T")


class DiscoveryFailed(RuntimeError):
    """Discovery itself could not be carried out: a reason to fall back, where a bug of the model is none."""


class RankFailed(RuntimeError):
    """Another rank failed: ``rank``, and its exception as ``cause`` (type, message and line, as text).

    may_fall_back: it was a ``DiscoveryFailed``.
    """

    def __init__(self, rank: int, cause: str, may_fall_back: bool = False) -> None:
        super().__init__(f"rank {rank} failed during batch-size discovery: {cause}")
        self.rank = rank
        self.cause = cause
        self.may_fall_back = may_fall_back

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.rank, self.cause, self.may_fall_back)


@dataclass(frozen=True)
class Ranks:
    """The ranks of the default process group; of one rank alone, nothing is exchanged."""

    rank: int
    size: int
    device: torch.device

    def each(self, work: Callable[[], T]) -> list[T]:
        """``work()`` on every rank; its values by rank, on every rank.

        What the own work raises is raised here; RankFailed where another's did.
        """
        if self.size == 1:
            return [work()]
        value, error = _attempted(work)
        return self._shared(value, error)

    def own(self, work: Callable[[], T]) -> T:
        """``work()`` on every rank; its own value, which stays here. Raises as ``each`` does."""
        value, error = _attempted(work)
        if self.size == 1 and error is not None:
            raise error
        if self.size > 1:
            self._shared(None, error)
        return value  # type: ignore[return-value]

    def _shared(self, value: Any, error: Exception | None) -> list[Any]:
        cause = None if error is None else _described(error)
        told = self._exchange((value, cause, isinstance(error, DiscoveryFailed)))
        if error is not None:
            raise error
        for rank, (_, cause, may_fall_back) in enumerate(told):
            if cause is not None:
                raise RankFailed(rank, cause, may_fall_back)
        return [value for value, _, _ in told]

    def first(self, work: Callable[[], T]) -> T:
        """``work()`` on rank 0 alone; its value on every rank. Raises as ``each`` does."""
        return self.each(lambda: work() if self.rank == 0 else None)[0]  # type: ignore[return-value]

    def _exchange(self, value: Any) -> list[Any]:
        import torch
        import torch.distributed as dist

        # NCCL sends from the current GPU, which a user who names the device need not have set.
        on_gpu = torch.cuda.device(self.device) if self.device.type == "cuda" else contextlib.nullcontext()
        told: list[Any] = [None] * self.size
        with on_gpu:
            dist.all_gather_object(told, value)
        return told


def _described(error: Exception) -> str:
    if isinstance(error, DiscoveryFailed):  # a description already
        return str(error)
    if isinstance(error, ValueError):  # about what was asked: the line where that was noticed says nothing
        return f"{type(error).__name__}: {' '.join(str(error).split())}"
    return describe(error)


def _attempted(work: Callable[[], T]) -> tuple[T | None, Exception | None]:
    try:
        return work(), None
    except Exception as error:
        return None, error


def ranks_of(ddp_rank: int, ddp_world_size: int, device: torch.device) -> Ranks:
    """The ranks to agree with. Raises ``ValueError`` with one line where they are not there or are others."""
    import torch.distributed as dist

    if ddp_world_size == 1:
        return Ranks(0, 1, device)
    if not (dist.is_available() and dist.is_initialized()):
        raise ValueError(
            f"ddp_world_size={ddp_world_size}, and no process group is initialised for these ranks to agree "
            "through; call torch.distributed.init_process_group() first, or give ddp_world_size=1"
        )
    if (ddp_rank, ddp_world_size) != (dist.get_rank(), dist.get_world_size()):
        raise ValueError(
            f"ddp_rank={ddp_rank} of ddp_world_size={ddp_world_size}, and the process group says rank "
            f"{dist.get_rank()} of {dist.get_world_size()}; give the group's own, "
            "torch.distributed.get_rank() and get_world_size()"
        )
    return Ranks(ddp_rank, ddp_world_size, device)
