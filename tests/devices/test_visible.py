"""``CUDA_VISIBLE_DEVICES`` by CUDA's rules."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pytest_gputrain.devices import Gpu, Inventory, visible_gpus

FOUR = Inventory(
    tuple(Gpu(index, f"GPU-{index}a00-{index}", "NVIDIA H200", 1, False, "NVML") for index in range(4)),
    "NVML",
)
CUT = Inventory(
    (
        Gpu(0, "MIG-1a", "slice", 1, True, "NVML"),
        Gpu(0, "MIG-1b", "slice", 1, True, "NVML"),
        Gpu(1, "GPU-2a", "NVIDIA H200", 1, False, "NVML"),
    ),
    "NVML",
)


def indices(asked: str | None, inventory: Inventory = FOUR) -> list[int]:
    environ = {} if asked is None else {"CUDA_VISIBLE_DEVICES": asked}
    return [gpu.index for gpu in visible_gpus(inventory, environ)]


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        (None, [0, 1, 2, 3]),
        ("", []),
        ("-1", []),
        ("NoDevFiles", []),
        ("2", [2]),
        ("3,1", [3, 1]),
        (" 3 , 1 ", [3, 1]),
        ("0,7,1", [0]),  # an entry that names nothing ends the list
        ("0,-1,1", [0]),
        ("0,,1", [0]),
        ("1,1", []),  # CUDA refuses to start
        ("GPU-2a00-2", [2]),
        ("GPU-3,GPU-0", [3, 0]),  # a prefix will do
        ("GPU-", []),  # but not one that four share
        ("GPU-9", []),
        ("1,GPU-1a00", []),  # the same GPU twice, by index and by UUID
    ],
)
def test_rules(asked: str | None, expected: list[int]) -> None:
    assert indices(asked) == expected


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        (None, ["MIG-1a", "MIG-1b", "GPU-2a"]),
        ("MIG-1b", ["MIG-1b"]),
        ("MIG-1", []),
        ("0", ["MIG-1a"]),
        ("1", ["GPU-2a"]),
    ],
)
def test_slices(asked: str | None, expected: list[str]) -> None:
    environ = {} if asked is None else {"CUDA_VISIBLE_DEVICES": asked}
    assert [gpu.uuid for gpu in visible_gpus(CUT, environ)] == expected


def test_a_uuid_in_full_goes_before_those_it_begins() -> None:
    both = Inventory(
        tuple(Gpu(i, u, "x", 1, False, "NVML") for i, u in enumerate(("GPU-12", "GPU-1"))), "NVML"
    )
    assert indices("GPU-1", both) == [1]


@given(st.text(alphabet="0123-,GPUMIGa ", max_size=30))
def test_never_more_than_there_are_and_none_twice(asked: str) -> None:
    found = indices(asked)
    assert len(found) == len(set(found)) <= 4


@given(st.permutations(range(4)), st.integers(0, 4))
def test_legal_indices_come_back_in_order(order: list[int], length: int) -> None:
    assert indices(",".join(map(str, order[:length]))) == order[:length]
