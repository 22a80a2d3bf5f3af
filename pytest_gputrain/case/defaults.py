"""What a `TrainingCase` does where its author gave nothing: each of these is the right thing to do.

The step accumulates over micro-batches and scales by the loss's reduction, so that the gradient is the
full batch's, on one process and under data parallelism (which averages over ranks). It clips nothing,
schedules nothing and scales no mixed precision: a loop that does gives its own ``step``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

from pytest_gputrain.case import pytree
from pytest_gputrain.case.returned import checked_count, checked_loss, checked_optimizer

DEFAULT_LEARNING_RATE = 1e-3
DEFAULT_STREAM_BATCH = 4  # for batches() only; a check asks batch() for the size it wants


def split(batch: Any, parts: int) -> list[Any]:
    """Micro-batches: every tensor cut on dimension 0. Raises ValueError when that cannot be done."""
    return pytree.chunk(batch, parts)


def optimizer(model: Any) -> Any:
    """AdamW over the trainable parameters, learning rate 1e-3."""
    import torch

    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return torch.optim.AdamW(trainable, lr=DEFAULT_LEARNING_RATE)


def wrap(model: Any) -> Any:
    """DistributedDataParallel, on the model's own device."""
    from torch.nn.parallel import DistributedDataParallel

    device = next((parameter.device for parameter in model.parameters()), None)
    if device is None or device.type != "cuda":
        return DistributedDataParallel(model)
    return DistributedDataParallel(model, device_ids=[device.index])


def compile_model(model: Any) -> Any:
    """``torch.compile(model, dynamic=False)``."""
    import torch

    return torch.compile(model, dynamic=False)


def unwrapped(model: Any) -> Any:
    """The model inside DistributedDataParallel, DataParallel and torch.compile's wrapper."""
    from torch.nn.parallel import DataParallel, DistributedDataParallel

    while True:
        if isinstance(model, DistributedDataParallel | DataParallel):
            model = model.module
        elif hasattr(model, "_orig_mod"):
            model = model._orig_mod
        else:
            return model


def state_dict(model: Any) -> dict[str, Any]:
    """The unwrapped model's state: keys without ``module.`` and ``_orig_mod.``, also of compiled regions."""
    state: dict[str, Any] = unwrapped(model).state_dict()
    return {name.replace("_orig_mod.", ""): value for name, value in state.items()}


@dataclass(frozen=True)
class DefaultBatches:
    """Repeats ``batch`` for ever, on the CPU."""

    batch: Callable[..., Any] | None = None

    def __call__(self) -> Iterator[Any]:
        import torch

        assert self.batch is not None
        while True:
            yield self.batch(DEFAULT_STREAM_BATCH, torch.device("cpu"))


@dataclass(frozen=True)
class DefaultStep:
    """One optimizer step over the micro-batches, as a correct loop does it."""

    loss: Callable[..., Any] | None = None
    loss_reduction: str = "mean"
    num_targets: Callable[..., Any] | None = None
    optimizer: Callable[..., Any] | None = None  # whose line a message names

    def __call__(self, model: Any, optimizer: Any, micro_batches: Sequence[Any]) -> Any:
        """Returns the detached loss of this rank's micro-batches, in the loss's own reduction."""
        assert self.loss is not None
        checked_optimizer(self.optimizer, optimizer)
        shares = self._shares(micro_batches)
        scale = self._scale(micro_batches)
        optimizer.zero_grad(set_to_none=True)
        total: Any = 0.0
        for index, (micro_batch, share) in enumerate(zip(micro_batches, shares, strict=True)):
            last = index == len(micro_batches) - 1
            with nullcontext() if last else _no_sync(model):
                loss = checked_loss(self.loss, self.loss(model, micro_batch))
                (loss * (share * scale)).backward()
            total = total + loss.detach() * share
        optimizer.step()
        return total

    def _shares(self, micro_batches: Sequence[Any]) -> list[float]:
        """What each micro-batch counts within this rank."""
        if self.loss_reduction == "sum":
            return [1.0] * len(micro_batches)
        weights = [self._weight(micro_batch) for micro_batch in micro_batches]
        total = sum(weights)
        return [weight / total if total else 0.0 for weight in weights]

    def _weight(self, micro_batch: Any) -> float:
        if self.loss_reduction == "token_mean":
            assert self.num_targets is not None
            return checked_count(self.num_targets, self.num_targets(micro_batch))
        return float(pytree.batch_length(micro_batch) or 1)

    def _scale(self, micro_batches: Sequence[Any]) -> float:
        """What this rank counts among all, times the world size, because data parallelism averages."""
        world_size = _world_size()
        if world_size == 1 or self.loss_reduction == "mean":
            return 1.0
        if self.loss_reduction == "sum":
            return float(world_size)
        own = sum(self._weight(micro_batch) for micro_batch in micro_batches)
        total = _sum_over_ranks(own, pytree.tensors(list(micro_batches)))
        return own * world_size / total if total else 0.0


def _no_sync(model: Any) -> AbstractContextManager[Any]:
    context: AbstractContextManager[Any] = model.no_sync() if hasattr(model, "no_sync") else nullcontext()
    return context


def _world_size() -> int:
    import torch.distributed as dist

    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def _sum_over_ranks(value: float, on: list[Any]) -> float:
    import torch
    import torch.distributed as dist

    # NCCL reduces only what lies on its GPU: count where the batch is.
    device = on[0].device if on else torch.device("cpu")
    total = torch.tensor(value, dtype=torch.float64, device=device)
    dist.all_reduce(total)
    return float(total)


UNBOUND_STEP = DefaultStep()
UNBOUND_BATCHES = DefaultBatches()
