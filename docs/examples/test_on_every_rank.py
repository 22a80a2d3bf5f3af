"""Tests whose body runs on every rank. The test suite runs this file."""

import pytest
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from pytest_gputrain import distributed


@pytest.fixture
def model():
    torch.manual_seed(0)
    return torch.nn.Linear(4, 1)  # made once, in the pytest process; every rank gets a copy


@distributed(world_size=2)
def test_gradients_are_averaged(model, rank, world_size, device):
    inputs = torch.full((1, 4), float(rank), device=device)
    model = DistributedDataParallel(model.to(device))
    model(inputs).sum().backward()
    mean = sum(range(world_size)) / world_size
    assert torch.equal(model.module.weight.grad, torch.full((1, 4), mean, device=device))


@pytest.mark.parametrize("num_ranks", [2, 4])
@distributed(world_size=2)
def test_ranks_see_what_the_test_sees(num_ranks, world_size, tmp_path, rank):
    if num_ranks != world_size:
        pytest.skip(f"for {num_ranks} ranks")  # on all ranks or on none
    (tmp_path / f"rank{rank}").touch()
    dist.barrier()
    assert len(list(tmp_path.iterdir())) == num_ranks


@pytest.mark.requires_gpus(2)
@distributed(world_size=2)
def test_on_two_gpus(device):
    value = torch.ones(1, device=device)
    dist.all_reduce(value)  # NCCL, one GPU a rank
    assert value.item() == 2
