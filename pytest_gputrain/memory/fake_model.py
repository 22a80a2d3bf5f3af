"""A case's own model made ready for a step on fake tensors: its weights, and what a wrapper would add."""

from __future__ import annotations

import contextlib
from typing import Any

import torch

from pytest_gputrain.memory.fake_seam import as_fake, is_fake


def make_fake(mode: Any, model: torch.nn.Module) -> None:
    """Weights that came for real (from a file, from numpy, on a GPU) are exchanged for fake ones."""
    twins: dict[int, Any] = {}  # tied weights stay tied
    for module in model.modules():
        for held in (module._parameters, module._buffers):
            for name, tensor in held.items():
                if tensor is not None and not is_fake(tensor):
                    if id(tensor) not in twins:
                        twins[id(tensor)] = _twin(mode, tensor)
                    held[name] = twins[id(tensor)]


def _twin(mode: Any, tensor: Any) -> Any:
    if tensor.device.type == "cpu":
        return as_fake(mode, tensor)
    with mode:
        twin = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype)
        if isinstance(tensor, torch.nn.Parameter):
            return torch.nn.Parameter(twin, requires_grad=tensor.requires_grad)
    return twin


def as_if_wrapped(model: Any) -> Any:
    """A step written for DistributedDataParallel finds ``.module`` and ``.no_sync()``."""
    for name, value in (
        ("module", model),
        ("no_sync", contextlib.nullcontext),
        ("join", contextlib.nullcontext),
    ):
        if not hasattr(model, name):
            with contextlib.suppress(AttributeError, TypeError):
                object.__setattr__(model, name, value)
    return model
