"""FLOPs of a real step, against arithmetic."""

from __future__ import annotations

import pytest


def test_a_step_of_a_linear_layer_is_three_products() -> None:
    import torch

    from pytest_gputrain.checks.flops import count_flops

    model = torch.nn.Sequential(torch.nn.Linear(32, 64, bias=False), torch.nn.Linear(64, 16, bias=False))
    batch = torch.randn(8, 32)
    found = count_flops(lambda: model(batch).sum().backward())
    assert found is not None
    # Forward, and the gradients of weights and inputs; the first layer's input needs none.
    assert found.number == 2 * 8 * (2 * 32 * 64 + 3 * 64 * 16)
    assert found.dtype == "float32"
    assert count_flops(lambda: batch + 1) is None


@pytest.mark.parametrize("dtype", ["bfloat16", "float64"])
def test_the_type_is_that_of_the_products(dtype: str) -> None:
    import torch

    from pytest_gputrain.checks.flops import count_flops

    one = torch.randn(4, 4, dtype=getattr(torch, dtype))
    found = count_flops(lambda: one @ one + one.float().sum())
    assert found is not None
    assert (found.number, found.dtype) == (2 * 4**3, dtype)
