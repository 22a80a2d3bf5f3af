"""What a discovery trains: the user's model, or one made from the case, as training will treat it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.nn.parallel import DistributedDataParallel

from pytest_gputrain.batch import probe_world
from pytest_gputrain.batch.probe import Conditions, TrainingProbe
from pytest_gputrain.batch.users_own import users_own
from pytest_gputrain.case import TrainingCase, defaults
from pytest_gputrain.case.defaults import unwrapped
from pytest_gputrain.memory.capacity import known_device, memory_of

SEED = 0  # of the weights that are drawn for probing; memory does not depend on them

# Of the host's free memory, what a discovery may fill with tensors where it is given no capacity. A process
# takes more than its tensors: 1.5 GB for a GPT whose tensors took 1.25 GB at most. What comes beyond the
# host's memory is no exception, but the kernel that kills.
HOST_SHARE = 0.8

BUCKETS_REAL = "buckets of DistributedDataParallel included, by a group of this rank alone"
BUCKETS_THERE = "buckets of the given DistributedDataParallel are there already"
BUCKETS_RESERVED = "no gloo here: one copy of the gradients is kept free for buckets"

STRANGE_OPTIMIZER = (
    "the optimizer given holds none of the model's parameters, so its state may be missing from the peaks; "
    "make it after the model, from model.parameters()"
)


@dataclass(frozen=True)
class Memory:
    """Of the device, in bytes: ``free`` is what others leave to this process, with what it holds already.

    Of a host, the share that tensors may fill.
    """

    device: torch.device
    free: int


def memory_here(device: str | torch.device, model: torch.nn.Module | None) -> Memory:
    """Ask the device. Raises ``ValueError`` for one that is not there, ``OSError`` or the like if it cannot
    tell.
    """
    place = known_device(device)
    free, _ = memory_of(place)
    if place.type == "cuda":
        torch.cuda.init()
        return Memory(place, free + torch.cuda.memory_allocated(place))
    own = num_bytes([*model.parameters(), *model.buffers()]) if model is not None else 0
    return Memory(place, int(free * HOST_SHARE) + own)


@dataclass(frozen=True)
class Target:
    """``reserved``: bytes that training will take beside what a probe sees. data_parallel: how it was
    counted.
    """

    case: TrainingCase
    model: torch.nn.Module
    optimizer: torch.optim.Optimizer | None
    device: torch.device
    conditions: Conditions
    reserved: int = 0
    data_parallel: str = ""

    def with_data_parallel(self, world_size: int) -> Target:
        """Count the buckets, one more copy of the gradients, where training will be data parallel."""
        given = _data_parallel_inside(self.model)
        if given is None and world_size == 1 and not probe_world.others_are_there():
            return self
        model = self.model if given is None else _without(self.model, given, self.case)
        # The limit of a GPU counts everything that this process holds; that of a CPU what the probe touches.
        if given is not None and self.device.type == "cuda":
            return replace(self, model=model, data_parallel=BUCKETS_THERE)
        if not probe_world.can_be_made():
            reserved = num_bytes([one for one in model.parameters() if one.requires_grad])
            return replace(self, model=model, reserved=reserved, data_parallel=BUCKETS_RESERVED)
        conditions = replace(self.conditions, wrapped=True)
        return replace(self, model=model, conditions=conditions, data_parallel=BUCKETS_REAL)

    def probe(self, limit: int) -> TrainingProbe:
        """A context manager around all probes of a discovery."""
        return TrainingProbe(
            self.case, self.model, self.conditions, device=self.device, limit=limit, optimizer=self.optimizer
        )

    def doubts(self) -> list[str]:
        """What makes any answer doubtful. No error: an optimizer of master weights holds its own copies."""
        if self.optimizer is None:
            return []
        held = {id(one) for group in self.optimizer.param_groups for one in group["params"]}
        return [] if held & {id(one) for one in self.model.parameters()} else [STRANGE_OPTIMIZER]

    def cache_key(
        self, world_size: int, settings: Mapping[str, object], components: object
    ) -> dict[str, Any]:
        """What the measured peaks depend on."""
        from pytest_gputrain.batch.cache_key import cache_key, functions_of

        torch.manual_seed(SEED)
        with users_own():
            optimizer = self.optimizer
            # Of the default one None says enough. Making an optimizer imports torch's compiler: seconds that
            # a cache hit has no other use for.
            if optimizer is None and self.case.optimizer is not defaults.optimizer:
                optimizer = self.case.optimizer(self.model)
            batch = self.case.batch(1, self.device)
        return cache_key(
            self.model,
            device=self.device,
            optimizer=optimizer,
            batch=batch,
            compiled=self.conditions.compiled,
            world_size=world_size,
            functions=functions_of(self.case),
            settings={
                **settings,
                "iterations": self.conditions.iterations,
                "eval_batch_factor": self.conditions.eval_batch_factor,
                "checkpointing": self.conditions.checkpointing,
                "data_parallel": self.data_parallel,
            },
            components=components,
        )


def target_of(
    case: TrainingCase,
    model: torch.nn.Module | None,
    optimizer: torch.optim.Optimizer | None,
    device: torch.device,
    conditions: Conditions,
    world_size: int,
) -> Target:
    """The user's model, or one of the case's own, drawn for now.

    Raises ``ValueError`` where one rank alone cannot train it on this device.
    """
    if model is None:
        torch.manual_seed(SEED)
        with users_own():
            model = case.model().to(device)
    require_trainable(model, device)
    return Target(case, model, optimizer, device, conditions).with_data_parallel(world_size)


def require_trainable(model: torch.nn.Module, device: torch.device) -> None:
    """Raise ``ValueError`` with one line where a probe of this model on this device is not possible."""
    found = {parameter.device for parameter in model.parameters()}
    places = {
        where if where.type == "cpu" or where.index is not None else known_device(where) for where in found
    }
    if places - {device}:
        elsewhere = ", ".join(sorted(map(str, places - {device})))
        raise ValueError(
            f"the model is on {elsewhere}, device is {device}; move it there first: model.to({str(device)!r})"
        )
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ValueError(
            f"{type(model).__name__} has no parameter that requires a gradient: nothing to train"
        )
    if any(hasattr(parameter, "device_mesh") for parameter in model.parameters()):
        raise ValueError(
            f"{type(model).__name__} is sharded (its parameters are DTensors): one rank alone cannot train "
            "it, so discovery does not cover it; give override=, or discover before sharding"
        )


def num_bytes(tensors: list[Any]) -> int:
    """Of the tensors' values."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def micro_batches_of(share: int | None) -> Callable[[int], int]:
    """How many micro-batches a probed step takes: 2 stand for more, as the second has all in memory."""
    return lambda batch_size: 1 if share is None or batch_size >= share else 2


def _data_parallel_inside(model: torch.nn.Module) -> DistributedDataParallel | None:
    inside: Any = model
    while hasattr(inside, "_orig_mod"):
        inside = inside._orig_mod
    return inside if isinstance(inside, DistributedDataParallel) else None


def _without(model: torch.nn.Module, wrapper: DistributedDataParallel, case: TrainingCase) -> torch.nn.Module:
    """The model inside, compiled if the wrapper was: collectives of the real group would wait for other
    ranks.
    """
    inside: torch.nn.Module = wrapper.module
    if model is wrapper or inside is not unwrapped(inside):
        return inside
    compiled: torch.nn.Module = case.compile(inside)
    return compiled
