"""What is told of a wrong gradient: where it comes from, and what it was made of. In one process."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

from pytest_gputrain import TrainingCase
from pytest_gputrain.tensor_parallel.golden_reasons import _across, _shorter
from pytest_gputrain.tensor_parallel.golden_watch import watched
from pytest_gputrain.tensor_parallel.golden_world import World


class Branches(nn.Module):
    """Two layers read the norm's output; a third reads that of one of them, and a gate nothing of theirs."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.gate = nn.LayerNorm(4), nn.Linear(4, 4)
        self.left, self.right, self.last = (nn.Linear(4, 4) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        weight = self.gate(x).softmax(-1)
        out: Tensor = weight * self.last(self.left(h).relu()) + self.right(h)
        return out


def test_layers_know_whose_output_they_read_and_depend_on() -> None:
    case = TrainingCase(
        name="branches",
        model=Branches,
        batch=lambda rows, device: torch.randn(rows, 4, device=device),
        loss=lambda model, batch: model(batch).sum(),
    )
    watch = watched(case, Branches(), torch.randn(2, 4, requires_grad=True), 0)
    assert watch.reads == {"left": "norm", "right": "norm"}
    assert watch.behind("norm") == {"left", "last", "right"}
    assert watch.behind("left") == {"last"}
    assert watch.behind("gate") == set()


def test_values_of_a_shorter_type_are_known() -> None:
    wanted = torch.randn(64)
    assert _shorter(wanted, wanted + 1e-6) is None
    assert _shorter(wanted, wanted.bfloat16().float()) == "bfloat16"
    assert _shorter(wanted, wanted.half().float()) == "float16"
    assert _shorter(torch.ones(8), torch.full((8,), 2.0)) is None  # whole numbers are, whatever was done
    assert _shorter(wanted, torch.zeros(64)) is None


class Ranks:
    """All ranks in one process: what one has is what all have."""

    size = 4

    def merged(self, by_rank: dict[int, Any]) -> list[Any]:
        return [by_rank[rank] for rank in range(self.size)]


def test_a_part_that_several_ranks_hold_has_to_be_summed_over_those() -> None:
    parts = torch.randn(2, 8)
    own = {rank: (parts[rank // 2], parts[rank // 2] * (0.3 if rank % 2 else 0.7)) for rank in range(4)}
    assert _across(own, cast(World, Ranks())) == (
        "gradient is not summed over the ranks that hold the same part, such as 0 and 1"
    )
    summed = {rank: (parts[rank // 2], parts.sum(0)) for rank in range(4)}
    assert _across(summed, cast(World, Ranks())).startswith(
        "gradient is 0.5 times the sum of all ranks' parts"
    )
    right = {rank: (parts[rank // 2], parts[rank // 2]) for rank in range(4)}
    assert _across(right, cast(World, Ranks())) == ""


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.layer(self.layer(x).relu())
        return out


def test_calls_of_one_module_are_told_apart() -> None:
    case = TrainingCase(
        name="twice",
        model=Twice,
        batch=lambda rows, device: torch.randn(rows, 4, device=device),
        loss=lambda model, batch: model(batch).sum(),
    )
    watch = watched(case, Twice(), torch.randn(2, 4, requires_grad=True), 0)
    assert watch.order == ["layer", "layer (call 2)"]
    assert watch.behind("layer") == {"layer (call 2)"}
    assert torch.equal(watch.outputs["layer (call 2)"], torch.ones(2, 4))
