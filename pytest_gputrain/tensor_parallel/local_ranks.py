"""The one place that knows ``torch.distributed._local_tensor``, which is private and may be absent."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, TypeVar

import torch
from torch import nn
from torch.distributed.tensor import Replicate, Shard

from pytest_gputrain.tensor_parallel.golden_world import Pieces, default_group, is_dtensor, plain
from pytest_gputrain.tensor_parallel.simulated import SimulationError

T = TypeVar("T")
WAY_OUT = "use real ranks"


def available() -> bool:
    """Whether this torch has the local-tensor mode."""
    try:
        import torch.distributed._local_tensor  # noqa: F401
    except ImportError:
        return False
    return True


class SimulatedWorld:
    """All ranks in this process. Each plain model that is spread becomes one of tensors by rank."""

    simulated = True

    def __init__(self, size: int, group: Any) -> None:
        from torch.distributed._local_tensor import LocalTensorMode

        self.size = size
        self.held: tuple[int, ...] = tuple(range(size))
        self._group = group
        self._mode = LocalTensorMode(size)  # one, since it remembers the ranks' places on a mesh

    def pieces(self, tensor: Any) -> Pieces:
        tensor = tensor.detach()
        return self._by_rank(tensor._local_tensor if is_dtensor(tensor) else tensor)

    def whole(self, tensor: Any) -> Pieces:
        """Joined here where that is plain to see: full_tensor() takes a hundred times as long."""
        pieces = self.pieces(tensor)
        if not is_dtensor(tensor):
            return pieces
        placement = tensor.placements[0]
        if len(tensor.placements) > 1 or type(placement) not in (Shard, Replicate):
            with self.acting():
                return self._by_rank(tensor.detach().full_tensor())
        if isinstance(placement, Shard):
            joined = torch.cat([pieces[rank] for rank in self.held], placement.dim)
            return dict.fromkeys(self.held, joined)
        return pieces

    def _by_rank(self, tensor: Any) -> Pieces:
        from torch.distributed._local_tensor import LocalTensor

        tensor = plain(tensor)
        if isinstance(tensor, LocalTensor):
            return {rank: tensor._local_tensors[rank] for rank in self.held}
        return dict.fromkeys(self.held, tensor)

    def merged(self, by_rank: Mapping[int, T]) -> list[T]:
        return [by_rank[rank] for rank in self.held]

    def broadcast(self, tensors: Sequence[torch.Tensor]) -> None:
        pass

    def alone(self) -> AbstractContextManager[None]:
        return contextlib.nullcontext()

    @contextlib.contextmanager
    def acting(self) -> Iterator[None]:
        with default_group(self._group), _rank_refused(), self._mode:
            yield

    def spread(self, model: nn.Module) -> None:
        from torch.distributed._local_tensor import LocalTensor

        made: dict[int, Any] = {}
        for module in model.modules():
            for name, parameter in module._parameters.items():
                if parameter is not None:
                    if id(parameter) not in made:
                        local_tensor = LocalTensor({r: parameter.detach().clone() for r in self.held})
                        made[id(parameter)] = nn.Parameter(local_tensor, parameter.requires_grad)
                    module._parameters[name] = made[id(parameter)]
            for name, buffer in module._buffers.items():
                if buffer is not None:
                    module._buffers[name] = LocalTensor({r: buffer.detach().clone() for r in self.held})


@contextlib.contextmanager
def simulated_mesh(size: int) -> Iterator[Any]:
    """A mesh over a group of pretended ranks beside whatever group this process has."""
    if not available():
        raise SimulationError(
            f"torch {torch.__version__} has no local-tensor mode to simulate {size} ranks with; {WAY_OUT}"
        )
    import torch.distributed as dist
    from torch.distributed._local_tensor import LocalTensorMode
    from torch.distributed.device_mesh import init_device_mesh
    from torch.testing._internal.distributed.fake_pg import FakeStore

    before = set(dist.distributed_c10d._world.pg_map)
    try:
        with default_group(None):
            dist.init_process_group("fake", rank=0, world_size=size, store=FakeStore())
            group = dist.GroupMember.WORLD
            with LocalTensorMode(size):
                mesh = init_device_mesh("cpu", (size,), mesh_dim_names=("tp",))
        yield mesh, group
    finally:
        # One by one: destroying the default group would take this process's real ones along.
        for made in set(dist.distributed_c10d._world.pg_map) - before:
            dist.destroy_process_group(made)
        _forget_placements()


def _forget_placements() -> None:
    """DTensor remembers decisions with the mesh that they were made for, and equal meshes share them."""
    from torch.distributed.tensor import debug

    clear = getattr(debug, "_clear_sharding_prop_cache", None)
    if clear is not None:
        clear()


@contextlib.contextmanager
def _rank_refused() -> Iterator[None]:
    """``get_rank()`` of the model's code would be that of one rank for all: it is refused, with its line."""
    import torch.distributed as dist
    from torch.distributed import distributed_c10d

    original = dist.get_rank

    def get_rank(group: Any = None) -> int:
        frame = sys._getframe(1)
        if str(frame.f_globals.get("__name__", "")).partition(".")[0] == "torch":
            return original(group)
        raise SimulationError(
            f"the model's code asks for its rank ({frame.f_code.co_filename}:{frame.f_lineno}), which "
            f"simulated ranks, being one process, do not have; {WAY_OUT}, or DTensor plans"
        )

    dist.get_rank = distributed_c10d.get_rank = get_rank
    try:
        yield
    finally:
        dist.get_rank = distributed_c10d.get_rank = original
