"""The five-minute tour of the README, one test a stop. The test suite runs this file."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from my_cases import llama

from pytest_gputrain import parametrize_with_checks

SCRIPT = Path(__file__).with_name("train.py")


def test_a_function_on_two_ranks(ddp_launcher):
    factor = 10  # closures travel

    def mean_of_ranks():
        value = torch.tensor([float(dist.get_rank() * factor)])
        dist.all_reduce(value, op=dist.ReduceOp.AVG if dist.get_backend() == "nccl" else dist.ReduceOp.SUM)
        return value

    result = ddp_launcher(mean_of_ranks, world_size=2)
    assert [value.item() for value in result.values] == [10.0, 10.0]


def test_an_unmodified_script(ddp_launcher):
    result = ddp_launcher.torchrun(SCRIPT, "--steps", 3, nproc=2)
    assert all("done" in rank.stdout for rank in result.ranks)


def test_every_parameter_learns(grad_tracer):
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 1))
    with grad_tracer(model) as tracer:
        model(torch.randn(2, 4)).sum().backward()
    tracer.assert_all_arrived()


@pytest.mark.requires_gpus(2)
def test_on_two_gpus(ddp_launcher, gpu_count):
    assert gpu_count >= 2
    ddp_launcher(lambda: dist.barrier(), world_size=2)  # NCCL, one GPU a rank


@parametrize_with_checks([llama])
def test_training(case, check):
    check(case)
