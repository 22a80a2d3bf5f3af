"""The training script's model, loss, optimizer and step as a `TrainingCase`: its batch size can be found.

What the probe of a batch size runs is the very step that trains: clipping, weighting, precision and all.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from pytest_gputrain.case import TrainingCase
from pytest_gputrain.case.defaults import DEFAULT_LEARNING_RATE
from pytest_gputrain.case.pytree import batch_length, tensors
from pytest_gputrain.case.training_case import LossReduction
from pytest_gputrain.reference.gpt import GPTConfig, build, set_checkpointing
from pytest_gputrain.reference.sft_data import num_targets
from pytest_gputrain.reference.train_data import Samples
from pytest_gputrain.reference.train_options import Options

WEIGHT_DECAY = 0.01
AUTOCAST = {"bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class ClippedStep:
    """One optimizer step over micro-batches: the full batch's gradient, one all-reduce, clipped once.

    Weights are samples where every rank has as many of them ("mean"), else the tokens that count over all
    ranks ("token_mean"); a "sum" is only undone DDP's averaging.
    """

    loss: Callable[[Any, Any], Tensor]
    loss_reduction: str
    num_targets: Callable[[Any], int] | None
    max_norm: float

    def __call__(self, model: Any, optimizer: Any, micro_batches: Sequence[Any]) -> Tensor:
        """Returns this rank's share of the loss, detached; its mean over the ranks is the batch's."""
        optimizer.zero_grad(set_to_none=True)
        scales = self._scales(micro_batches)
        total = torch.zeros(())
        for number, (micro_batch, scale) in enumerate(zip(micro_batches, scales, strict=True), 1):
            last = number == len(micro_batches)
            # The forward belongs inside: DDP decides there whether the coming backward synchronises.
            with nullcontext() if last or not hasattr(model, "no_sync") else model.no_sync():
                loss = self.loss(model, micro_batch) * scale
                loss.backward()
            total = total.to(loss.device) + loss.detach()
        nn.utils.clip_grad_norm_(model.parameters(), self.max_norm)
        optimizer.step()
        return total

    def _scales(self, micro_batches: Sequence[Any]) -> list[float]:
        world_size = dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
        if self.loss_reduction == "sum":
            return [float(world_size)] * len(micro_batches)
        if self.loss_reduction == "mean":
            lengths = [float(batch_length(micro_batch) or 1) for micro_batch in micro_batches]
            return [length / sum(lengths) for length in lengths]
        assert self.num_targets is not None
        counts = [float(self.num_targets(micro_batch)) for micro_batch in micro_batches]
        everywhere = sum(counts) if world_size == 1 else summed(sum(counts), _device_of(micro_batches[0]))
        return [count * world_size / max(everywhere, 1.0) for count in counts]


def summed(value: float, device: torch.device) -> float:
    """The sum over all ranks; ``device`` is where the group can reduce."""
    total = torch.tensor(value, dtype=torch.float64, device=device)
    dist.all_reduce(total)
    return float(total)


def _device_of(batch: Any) -> torch.device:
    found = tensors(batch)
    return found[0].device if found else torch.device("cpu")


def token_loss(dtype: str, model: Any, batch: dict[str, Tensor]) -> Tensor:
    """Mean cross entropy over the tokens that count, a scalar in float32."""
    device = batch["inputs"].device.type
    with torch.autocast(device, AUTOCAST[dtype]) if dtype in AUTOCAST else nullcontext():
        logits = model(batch["inputs"])
    return F.cross_entropy(logits.flatten(0, 1).float(), batch["targets"].flatten())


def make_model(config: GPTConfig, checkpointing: bool) -> nn.Module:
    model = build(config)
    if checkpointing:
        set_checkpointing(model, None)
    return model


def make_optimizer(name: str, lr: float | None, model: nn.Module) -> torch.optim.Optimizer:
    """``lr`` None: the default of a case's optimizer."""
    lr = DEFAULT_LEARNING_RATE if lr is None else lr
    if name == "sgd":
        return torch.optim.SGD(model.parameters(), lr=lr)
    return torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=WEIGHT_DECAY)


def stage_case(options: Options, config: GPTConfig, samples: Samples) -> TrainingCase:
    """The script's own model at a stage; documents count their tokens, everything else its samples."""
    loss = partial(token_loss, options.dtype)
    reduction: LossReduction = "token_mean" if options.stage == "sft" else "mean"
    return TrainingCase(
        name=f"train-{options.stage}-d{config.depth}",
        model=partial(make_model, config, options.checkpointing),
        batch=samples.longest,
        loss=loss,
        loss_reduction=reduction,
        num_targets=num_targets,
        optimizer=partial(make_optimizer, options.optimizer, options.lr),
        step=ClippedStep(loss, reduction, num_targets, options.max_norm),
        set_checkpointing=set_checkpointing,
    )


def with_clipping(case: TrainingCase, max_norm: float) -> Callable[..., Any]:
    """A user's own step as it is; where the case has none, the script's, which clips."""
    if case.has_own_step:
        own: Callable[..., Any] = case.step
        return own
    return ClippedStep(case.loss, case.loss_reduction, case.num_targets, max_norm)
