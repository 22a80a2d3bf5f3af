"""Healthy models that look suspicious to a simple check."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel as DDP

from pytest_gputrain.case import TrainingCase
from tests.planted.broken_gradients import CheckpointedNet, turn_on
from tests.planted.broken_hangs import find_unused
from tests.planted.plant import WIDTH, Block, Net, case, healthy, healthy_but


@healthy
def plain() -> TrainingCase:
    return case("plain")


def with_dropout() -> nn.Module:
    return CheckpointedNet(dropout=0.3)


@healthy
def dropout_with_checkpointing() -> TrainingCase:
    return case("dropout_with_checkpointing", model=with_dropout, set_checkpointing=turn_on)


class CheckpointsInTraining(CheckpointedNet):
    def run(self, block: nn.Module, x: Tensor) -> Tensor:
        if self.training:
            return super().run(block, x)
        out: Tensor = block(x)
        return out


def as_loaded() -> nn.Module:
    """from_pretrained gives models in eval mode."""
    return CheckpointsInTraining().eval()


@healthy
def model_given_in_eval_mode() -> TrainingCase:
    return case("model_given_in_eval_mode", model=as_loaded, set_checkpointing=turn_on)


def convnet() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1, bias=True),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 4),
    )


def image_draw(batch_size: int, device: Any) -> Any:
    return [torch.randn(batch_size, 1, 8, 8).to(device), torch.randint(4, (batch_size,)).to(device)]


def image_loss(model: Any, batch: Any) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


@healthy
def batchnorm_convnet() -> TrainingCase:
    return case("batchnorm_convnet", model=convnet, batch=image_draw, loss=image_loss)


class Experts(nn.Module):
    """A router that sends each sample to one of eight experts."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(WIDTH, 8)
        self.experts = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(8))
        self.head = nn.Linear(WIDTH, 4)

    def forward(self, x: Tensor) -> Tensor:
        chance, chosen = self.router(x).softmax(-1).max(-1)
        out = torch.zeros_like(x)
        for index, expert in enumerate(self.experts):
            rows = chosen == index
            if rows.any():
                out[rows] = expert(x[rows]) * chance[rows, None]
        result: Tensor = self.head(x + out)
        return result


@healthy_but("compile_no_recompiles")  # torch compiles nothing of it
def mixture_of_experts() -> TrainingCase:
    return case("mixture_of_experts", model=Experts, wrap=find_unused)


class DropsBlocks(Net):
    def __init__(self) -> None:
        super().__init__(3)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            if not self.training or torch.rand(()) > 0.5:
                x = block(x)
        out: Tensor = self.head(x)
        return out


@healthy_but("compile_no_recompiles")  # torch compiles little of it
def stochastic_depth() -> TrainingCase:
    return case("stochastic_depth", model=DropsBlocks, wrap=find_unused)


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(32, WIDTH)
        self.block = Block()
        self.head = nn.Linear(WIDTH, 32, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        out: Tensor = self.head(self.block(self.embedding(tokens)))
        return out


def token_draw(batch_size: int, device: Any) -> Any:
    tokens = torch.randint(32, (batch_size, 9)).to(device)
    return tokens[:, :-1], tokens[:, 1:]


def next_token_loss(model: Any, batch: Any) -> Tensor:
    return F.cross_entropy(model(batch[0]).flatten(0, 1), batch[1].flatten())


@healthy
def tied_weights() -> TrainingCase:
    return case("tied_weights", model=Tied, batch=token_draw, loss=next_token_loss)


def half() -> nn.Module:
    return Net().to(torch.bfloat16)


def half_loss(model: Any, batch: Any) -> Tensor:
    return F.cross_entropy(model(batch["x"].bfloat16()).float(), batch["y"])


@healthy
def bfloat16() -> TrainingCase:
    return case("bfloat16", model=half, loss=half_loss)


class Adapter(nn.Module):
    """A low-rank adapter beside a frozen layer; its second half starts at zero."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.layer = layer.requires_grad_(False)
        self.down = nn.Linear(layer.in_features, 2, bias=False)
        self.up = nn.Linear(2, layer.out_features, bias=False)
        nn.init.zeros_(self.up.weight)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.layer(x) + self.up(self.down(x))
        return out


def adapted() -> nn.Module:
    model = Net().requires_grad_(False)
    for block in model.blocks:
        assert isinstance(block, Block)
        block.up = Adapter(block.up)  # type: ignore[assignment]
    return model


@healthy
def frozen_backbone_with_adapters() -> TrainingCase:
    return case("frozen_backbone_with_adapters", model=adapted)


class SparseTokens(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(32, WIDTH, sparse=True)
        self.head = nn.Linear(WIDTH, 32)

    def forward(self, tokens: Tensor) -> Tensor:
        out: Tensor = self.head(self.embedding(tokens))
        return out


def sparse_sgd(model: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.1)


@healthy
def sparse_gradients() -> TrainingCase:
    return case(
        "sparse_gradients", model=SparseTokens, batch=token_draw, loss=next_token_loss, optimizer=sparse_sgd
    )


class RunningCentre(Net):
    """Trains on what its buffer says, which differs by rank unless the wrapper sends it around."""

    centre: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("centre", torch.zeros(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        out = super().forward(x - self.centre)
        self.centre.lerp_(x.detach().mean(0), 0.5)
        return out


@healthy
def buffer_that_forward_reads_and_writes() -> TrainingCase:
    return case("buffer_that_forward_reads_and_writes", model=RunningCentre)


def own_buffers(model: Any) -> nn.Module:
    return DDP(model, broadcast_buffers=False, gradient_as_bucket_view=True)


@healthy
def buffer_of_each_rank() -> TrainingCase:
    return case("buffer_of_each_rank", model=RunningCentre, wrap=own_buffers)


class Spectrum(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.filter = nn.Parameter(torch.randn(WIDTH // 2 + 1, dtype=torch.complex64) * 0.1 + 1)
        self.head = nn.Linear(WIDTH, 4)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(torch.fft.irfft(torch.fft.rfft(x) * self.filter, n=WIDTH))
        return out


@healthy
def complex_parameters() -> TrainingCase:
    return case("complex_parameters", model=Spectrum)


class Adversary(Net):
    """Recurrent, with a weight norm, a buffer that forward makes, and a print: all of it legitimate."""

    def __init__(self) -> None:
        super().__init__()
        self.recurrent = nn.GRU(WIDTH, WIDTH, batch_first=True)
        self.head = torch.nn.utils.parametrizations.weight_norm(self.head)

    def forward(self, x: Tensor) -> Tensor:
        self.register_buffer("last", x.detach().mean(), persistent=False)
        print("forward", tuple(x.shape))
        out, _ = self.recurrent(x[:, None].expand(-1, 3, -1))
        return super().forward(x + out[:, -1])


@healthy_but("compile_no_recompiles")  # it prints in forward
def recurrent_and_talkative() -> TrainingCase:
    return case("recurrent_and_talkative", model=Adversary)
