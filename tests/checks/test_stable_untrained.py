"""How tensors that no step trains are told apart, whatever their layout and dtype; what is said of them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pytest_gputrain.checks.stable_untrained import fingerprints
from pytest_gputrain.checks.stable_words import constants_differ, frozen_differ, statistics_differ


def printed(tensor: Tensor) -> str:
    return fingerprints({"one": tensor})["one"]


VALUES = torch.randn(6, 40, generator=torch.Generator().manual_seed(0))
LAYOUTS = {
    "dense": VALUES,
    "transposed": VALUES.t(),
    "every second": VALUES[:, ::2],
    "a view that is not aligned": VALUES.view(-1)[1:],
    "scalar": VALUES[0, 0],
    "bfloat16": VALUES.bfloat16(),
    "int8": (VALUES * 9).to(torch.int8),
    "bool": VALUES > 0,
    "complex": torch.complex(VALUES, VALUES),
    "parameter": nn.Parameter(VALUES.clone()),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_same_elements_have_the_same_print_and_others_another(layout: str) -> None:
    tensor = LAYOUTS[layout].detach()
    assert printed(tensor) == printed(tensor.clone())
    other = tensor.clone()
    line = other.view(-1) if other.is_contiguous() else other[-1]
    line[-1 if line.dim() else 0 :] = line[-1:].logical_not() if tensor.dtype is torch.bool else line[-1:] + 1
    assert printed(other) != printed(tensor)


def test_one_bit_of_many_and_another_order_are_seen() -> None:
    values = torch.randn(100_003)
    before = printed(values)
    values[77_777] = torch.nextafter(values[77_777], torch.tensor(9.0))
    assert printed(values) != before
    table = torch.arange(5000.0)
    assert printed(table) != printed(table[torch.randperm(5000)])


def test_prints_by_name_whatever_is_between() -> None:
    several = {"a": torch.zeros(3), "none": torch.zeros(0), "b": torch.ones(70, dtype=torch.int16)}
    found = fingerprints(several)
    assert found["none"] == ""
    assert found["a"] == printed(torch.zeros(3)) != found["b"]
    assert fingerprints({}) == {}


def test_what_is_said_of_frozen_parameters() -> None:
    frozen: dict[str, Any] = {
        "table": torch.zeros(1),
        "top": torch.zeros(1),
        "thawed": torch.zeros(1, requires_grad=True),
    }
    said = frozen_differ(0, {"table": [1, 3], "top": [2]}, frozen)
    assert (said.kind, said.step, said.rank) == ("divergence", 0, 1)
    assert said.message == (
        "frozen parameter table differs between ranks before the first step: ranks 1, 2, 3 and rank 0 hold "
        "different values (2 of 3 that were frozen: table, top); let every rank build, load and change it in "
        "the same way\n"
        "  likely: drawn, loaded or changed on a rank after the model was wrapped, which sends weights once, "
        "or averaged weights that one rank alone keeps up"
    )
    assert frozen_differ(100, {"thawed": [1]}, frozen).message == (
        "parameter thawed differs between ranks since one of steps 51 to 100: rank 1 and rank 0 hold "
        "different values (1 of 3 that were frozen: thawed); wrap the model again after unfreezing\n"
        "  likely: it was frozen when the model was wrapped, so its gradients are not averaged"
    )
    assert "differs between ranks after 33 steps:" in frozen_differ(33, {"top": [1]}, frozen).message


def test_what_is_said_of_buffers() -> None:
    assert constants_differ(60, {"bands": [1], "more": [1]}).message == (
        "buffer bands differs between ranks and none of 60 steps changed it: rank 1 and rank 0 compute with "
        "different constants (2 such buffers: bands, more); give every rank the same, or broadcast it from "
        "rank 0\n"
        "  likely: drawn from a seed of the rank's own, or made from the rank's own data; "
        "DistributedDataParallel sends buffers when it wraps and, unless broadcast_buffers=False, before a "
        "forward; FSDP never does"
    )
    end = "ranks hold different values, and a checkpoint takes one rank's"
    assert statistics_differ({"codes": [0, 1], "more": [0, 1]}, 2) == [
        f"buffer codes and 1 more follows each rank's own batches: {end}"
    ]
    assert statistics_differ({"average": [0]}, 2) == [
        f"buffer average is changed by the steps of rank 0 only: {end}"
    ]
    assert statistics_differ({}, 2) == []
