"""How a check's ranks compare what they hold, over a process group of their own.

Their own, so that a collective the user's code left pending is not taken for one of these.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

from pytest_gputrain.trace.digest import tensor_digest, value_digest, whole

_TEXT_BYTES = 24


class Peers:
    """All ranks of the launch. Every method is a collective: all ranks call it with as many items."""

    def __init__(self) -> None:
        import torch.distributed as dist

        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        self._group = dist.new_group(backend="gloo")

    def deviating(self, digests: Sequence[str]) -> list[list[int]]:
        """By item, the ranks whose digest is not rank 0's."""
        import torch
        import torch.distributed as dist

        if not digests:
            return []
        text = "".join(digest[:_TEXT_BYTES].ljust(_TEXT_BYTES) for digest in digests)
        own = torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8).view(len(digests), _TEXT_BYTES)
        gathered = [torch.empty_like(own) for _ in range(self.world_size)]
        dist.all_gather(gathered, own, group=self._group)
        differs = [(other != gathered[0]).any(dim=1).tolist() for other in gathered]
        return [
            [rank for rank in range(self.world_size) if differs[rank][item]] for item in range(len(digests))
        ]

    def agree(self, digest: str, flag: bool) -> tuple[bool, bool]:
        """Whether all ranks hold the same digest, and whether the flag is up on any: one small message."""
        import torch
        import torch.distributed as dist

        number = int.from_bytes(hashlib.blake2b(digest.encode(), digest_size=7).digest(), "big")
        largest = torch.tensor([number, -number, int(flag)])
        dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=self._group)
        most, least, raised = largest.tolist()
        return most == -least, bool(raised)

    def flagged(self, flags: Sequence[bool]) -> list[list[int]]:
        """By item, the ranks whose flag is set."""
        import torch
        import torch.distributed as dist

        own = torch.tensor([*flags, False], dtype=torch.uint8)
        gathered = [torch.empty_like(own) for _ in range(self.world_size)]
        dist.all_gather(gathered, own, group=self._group)
        return [
            [rank for rank in range(self.world_size) if gathered[rank][item]] for item in range(len(flags))
        ]

    def all_equal(self, value: Any) -> bool:
        """Whether ``repr(value)`` is the same on all ranks."""
        return not self.deviating([value_digest(repr(value))])[0]

    def any_rank(self, flag: bool) -> bool:
        """Whether the flag is up on any rank."""
        import torch
        import torch.distributed as dist

        raised = torch.tensor(int(flag))
        dist.all_reduce(raised, op=dist.ReduceOp.MAX, group=self._group)
        return bool(raised)

    def distances(self, tensor: Any) -> list[float]:
        """By rank, the largest difference of any element to rank 0's; shapes have to agree."""
        import torch
        import torch.distributed as dist

        own = whole(tensor).cpu().double().contiguous()
        first = own.clone()
        dist.broadcast(first, 0, group=self._group)
        largest = (own - first).abs().max().reshape(1) if own.numel() else torch.zeros(1, dtype=torch.double)
        gathered = [torch.empty_like(largest) for _ in range(self.world_size)]
        dist.all_gather(gathered, largest, group=self._group)
        return [float(value) for value in gathered]


def digests_of(tensors: dict[str, Any]) -> list[str]:
    return [tensor_digest(tensor) for tensor in tensors.values()]
