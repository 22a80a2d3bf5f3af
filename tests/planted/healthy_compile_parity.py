"""Compiled training that computes what eager computes, though it looks as if it did not."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pytest_gputrain.case import TrainingCase
from tests.planted.broken_compile_parity import DroppingNet
from tests.planted.plant import WIDTH, Net, case, draw, healthy, loss


@healthy
def dropout_compiled() -> TrainingCase:
    return case("dropout_compiled", model=DroppingNet)


class ShiftedNet(DroppingNet):
    """Compiled, it draws other random numbers than eager, with the same distribution."""

    def forward(self, x: Tensor) -> Tensor:
        if torch.compiler.is_compiling():
            x = x + 0 * torch.rand(1)
        return super().forward(x)


@healthy
def dropout_from_another_stream() -> TrainingCase:
    return case("dropout_from_another_stream", model=ShiftedNet)


class NormNet(nn.Module):
    """BatchNorm after each of two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.first = nn.Linear(WIDTH, 32), nn.BatchNorm1d(32)
        self.down, self.second = nn.Linear(32, 4), nn.BatchNorm1d(4)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.second(self.down(F.relu(self.first(self.up(x)))))
        return out


@healthy
def batchnorm_compiled() -> TrainingCase:
    return case("batchnorm_compiled", model=NormNet)


class HalfNet(Net):
    """bfloat16 under autocast."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, torch.bfloat16):
            out: Tensor = super().forward(x)
        return out.float()


@healthy
def autocast_compiled() -> TrainingCase:
    return case("autocast_compiled", model=HalfNet)


class TiedNet(nn.Module):
    """One matrix for embedding and head, as in language models; half of its weight never gets a gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(32, WIDTH)
        self.mix = nn.Linear(WIDTH, WIDTH)
        self.head = nn.Linear(WIDTH, 32, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        out: Tensor = self.head(torch.tanh(self.mix(self.embed(tokens))))
        return out


def draw_tokens(batch_size: int, device: Any) -> Tensor:
    return torch.randint(32, (batch_size, 9)).to(device)


def next_token(model: Any, tokens: Tensor) -> Tensor:
    return F.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())


@healthy
def tied_weights_compiled() -> TrainingCase:
    return TrainingCase(name="tied_weights_compiled", model=TiedNet, batch=draw_tokens, loss=next_token)


@healthy
def compiled_by_layer() -> TrainingCase:
    def compile_blocks(model: Any) -> Any:
        for block in model.blocks:
            block.compile(dynamic=False)
        return model

    return case("compiled_by_layer", model=Net, batch=draw, compile=compile_blocks)


def compile_in_a_function(model: Any) -> Any:
    """What the loop calls is no module: it takes no hooks, and shows its outputs to nobody."""
    return torch.compile(lambda x: model(x))


@healthy
def compiled_within_a_function() -> TrainingCase:
    return case("compiled_within_a_function", compile=compile_in_a_function)


@healthy
def loss_scaled_by_the_steps_own_count() -> TrainingCase:
    """A schedule that only the loop knows: both sides have to be as far in it."""
    taken: list[int] = []

    def step(model: Any, optimizer: Any, micro_batches: list[Any]) -> Tensor:
        taken.append(1)
        found = torch.stack([loss(model, batch) for batch in micro_batches]).mean()
        scaled = found * (1 + 4 / len(taken))
        optimizer.zero_grad()
        scaled.backward()
        optimizer.step()
        return scaled.detach()

    return case("loss_scaled_by_the_steps_own_count", step=step)
