"""In a rank: a few training steps of a case, wrapped and checkpointed as a phase asks.

Whether the ranks compute the right thing is for the checks to say; here the question is where it stops.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any, Literal, NoReturn

from pytest_gputrain.case import TrainingCase, pytree
from pytest_gputrain.case.returned import stream_of, wrapped_by
from pytest_gputrain.trace.layers import layers_of

BATCH_SIZE = 4  # samples a rank and step, as the checks take
_SEED = 1234
_RANK_STRIDE = 1_000_003


@dataclass(frozen=True, kw_only=True)
class How:
    """device: "cpu" or "cuda", the rank's GPU, which it may share.

    layers: the range to checkpoint by the case's own set_checkpointing, None for not at all.
    """

    steps: int
    device: str = "cpu"
    wrap: Literal["own", "fsdp2"] = "own"
    layers: tuple[int, int | None] | None = None


def train(case: TrainingCase, how: How) -> None:
    """Runs the loop."""
    import torch
    import torch.distributed as dist

    from pytest_gputrain.trace import study

    noted = study.install(os.environ, _never)
    noted.joined(None, str(dist.get_backend()))
    torch.set_num_threads(max(1, int(os.environ.get("OMP_NUM_THREADS", "1"))))
    model = build(case, how)
    if how.layers is not None and case.set_checkpointing is not None:
        case.set_checkpointing(model, slice(*how.layers))
    wrapped = shard(model) if how.wrap == "fsdp2" else wrapped_by(case, model)
    same = {id(p) for p in model.parameters()} == {id(p) for p in wrapped.parameters()}
    optimizer = case.optimizer(model if same else wrapped)
    torch.manual_seed(_SEED + (dist.get_rank() + 1) * _RANK_STRIDE)
    data = stream_of(case) if case.has_own_batches else None
    for _ in range(how.steps):
        if data is None:
            batch = case.batch(BATCH_SIZE, _device(how))
        elif (drawn := next(data, None)) is not None:
            batch = pytree.to_device(drawn, _device(how))
        else:
            break
        case.step(wrapped, optimizer, [batch])


def build(case: TrainingCase, how: How) -> Any:
    """Fresh weights, the same on every rank, in training mode."""
    import torch

    torch.manual_seed(_SEED)
    model = case.model().to(_device(how))
    return model if model.training else model.train()


def shard(model: Any) -> Any:
    """FSDP2, in the usual way: each layer by itself, then the rest."""
    from torch.distributed.fsdp import fully_shard

    for layer in layers_of(model):
        fully_shard(layer)
    return fully_shard(model)


def _device(how: How) -> Any:
    import torch

    if how.device == "cuda":
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device(how.device)


def _never() -> NoReturn:
    raise AssertionError("a case takes the steps it is told; GPUTRAIN_MAX_STEPS is for scripts")
