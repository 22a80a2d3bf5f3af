"""A comparison of its own, so that plans are not judged by the package's: a copy from before sharding."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

# Below this part of the model's largest gradient, one is rounding: OPT's key biases have none.
ROUNDING = 1e-5


def whole(value: Any) -> torch.Tensor:
    tensor: torch.Tensor = value.full_tensor() if isinstance(value, DTensor) else value
    return tensor.detach()


def tp_mesh() -> Any:
    import torch.distributed as dist

    return init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("tp",))


def random_weights(model: nn.Module) -> nn.Module:
    """Random everywhere, in float64: some models begin with zeros and ones, which hide errors."""
    with torch.no_grad():
        for parameter in model.double().parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.3)
    return model


def run(model: nn.Module, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits and loss, after the backward."""
    output = model(tokens)
    logits = output if isinstance(output, torch.Tensor) else output.logits
    loss = nn.functional.cross_entropy(logits.flatten(0, 1), tokens.roll(-1, 1).flatten())
    loss.backward()
    return whole(logits), whole(loss)


def errors(
    build: Callable[[], nn.Module],
    parallelize: Callable[[nn.Module, Any], Any],
    shape: tuple[int, int] = (2, 8),
) -> dict[str, float]:
    """Largest difference, relative to the largest value: "logits", "loss", each parameter's gradient."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = random_weights(build())
    reference = copy.deepcopy(model)
    model = parallelize(model, tp_mesh()) or model
    tokens = torch.randint(2, 50, shape)
    tokens[:, 1] = 1  # OPT's padding token
    expected, given = run(reference, tokens), run(model, tokens)
    found = dict(zip(("logits", "loss"), map(difference, expected, given), strict=True))
    found |= gradient_errors(reference, model)
    return found


def gradient_errors(reference: nn.Module, model: nn.Module) -> dict[str, float]:
    ours = dict(model.named_parameters())
    found = {}
    expected = {name: value.grad for name, value in reference.named_parameters() if value.grad is not None}
    largest = max(float(gradient.abs().max()) for gradient in expected.values())
    for name, gradient in expected.items():
        given: Any = ours[name].grad
        assert given is not None, f"no gradient at {name}"
        if isinstance(given, DTensor):
            parameter: Any = ours[name]
            assert given.placements == parameter.placements, name
        found[name] = difference(gradient, whole(given), floor=largest * ROUNDING)
    return found


def difference(expected: torch.Tensor, given: torch.Tensor, floor: float = 1e-30) -> float:
    assert expected.shape == given.shape, (expected.shape, given.shape)
    return float((expected - given).abs().max() / expected.abs().max().clamp_min(floor))
