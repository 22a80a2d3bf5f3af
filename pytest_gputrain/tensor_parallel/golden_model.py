"""The reference and the parallel model: equal weights, no shared memory, and the reference is asked first.

First, because a ``parallelize`` may change classes or functions for the whole process (``nn.Linear.forward``,
an attention function of a library), and a reference that runs after that is parallel as well. After it the
reference is asked once more: an answer that changed is told.

Every weight is moved a little from its initial value, by the same amount everywhere. A bias of zero, a norm's
weight of one and a projection that starts at zero hide just the bugs that this is about: zero times two is
zero. Dropout is off, by function; it has checks of its own.
"""

from __future__ import annotations

import contextlib
import random
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from pytest_gputrain.case import TrainingCase
from pytest_gputrain.trace.names import named_parameters

SEED = 1234
SHAKE = 0.05  # of a parameter's own size
NEARLY_ZERO, SIZE_FOR_ZERO = 1e-2, 0.4


class ComparisonError(ValueError):
    """Nothing can be compared; the message is one line: what was found, what is legal."""


def seed_everything(seed: int) -> None:
    """torch on all devices, random, and numpy where somebody uses it."""
    torch.manual_seed(seed)
    random.seed(seed)
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed(seed % 2**32)


def device_of(mesh: Any) -> torch.device:
    """This rank's device on the mesh."""
    if mesh.device_type == "cpu":
        return torch.device("cpu")
    return torch.device(mesh.device_type, torch.get_device_module(mesh.device_type).current_device())


def build(case: TrainingCase, device: torch.device, seed: int) -> nn.Module:
    """Fresh weights, in training mode. Raises ComparisonError where model() gives no module."""
    seed_everything(seed)
    model = case.model()
    if not isinstance(model, nn.Module):
        raise ComparisonError(
            f"model() returned a {type(model).__name__}; it has to return a torch.nn.Module"
        )
    model = model.to(device)
    return model if model.training else model.train()


def shake(model: nn.Module, seed: int) -> None:
    """Every floating-point parameter a little, and those near zero away from it."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.is_floating_point() or parameter.element_size() < 2:
                continue
            size = float(parameter.float().square().mean().sqrt()) if parameter.numel() else 0.0
            size = size if size > NEARLY_ZERO else SIZE_FOR_ZERO
            noise = torch.randn(parameter.shape, generator=generator).mul_(SHAKE * size)
            parameter.add_(noise.to(parameter.device, parameter.dtype))


def copy_weights(source: nn.Module, target: nn.Module) -> None:
    """Parameters and buffers by name; both models are the case's own, so they have the same."""
    buffers = dict(source.named_buffers())
    with torch.no_grad():
        for name, parameter in target.named_parameters():
            parameter.copy_(source.get_parameter(name))
        for name, buffer in target.named_buffers():
            if name in buffers and buffers[name].shape == buffer.shape:
                buffer.copy_(buffers[name])


def storages(model: nn.Module) -> set[int]:
    """The addresses of the memory behind parameters and buffers, empty ones apart."""
    tensors = [*model.parameters(), *model.buffers()]
    return {address for tensor in tensors if (address := address_of(tensor))}


def address_of(tensor: Any) -> int:
    """Where the storage of a tensor, or of a DTensor's part, begins; 0 where that cannot be said."""
    inner = getattr(tensor, "_local_tensor", tensor)
    try:
        return int(inner.untyped_storage().data_ptr())
    except (RuntimeError, NotImplementedError):  # a wrapper subclass without memory of its own
        return 0


class NoDropout(TorchFunctionMode):
    """Dropout as functions and modules call it gives its input back, also inside attention."""

    _FUNCTIONS = frozenset(
        name + end
        for name in ("dropout", "alpha_dropout", "feature_dropout", "feature_alpha_dropout")
        for end in ("", "_")
    ) | {"dropout1d", "dropout2d", "dropout3d"}

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if name in self._FUNCTIONS:
            return args[0] if args else kwargs["input"]
        if name == "scaled_dot_product_attention":
            args = (*args[:4], 0.0, *args[5:]) if len(args) > 4 else args
            kwargs = {**kwargs, "dropout_p": 0.0} if "dropout_p" in kwargs else kwargs
        return func(*args, **kwargs)


@contextlib.contextmanager
def asking(seed: int) -> Iterator[None]:
    """What a model is asked in: the same random state each time, no dropout."""
    seed_everything(seed)
    with NoDropout():
        yield


def parameters_of(model: nn.Module) -> dict[str, Any]:
    """Every parameter once, tied ones under their first name."""
    return named_parameters(model)


def aliases(model: nn.Module) -> dict[str, list[str]]:
    """First name to all names of each parameter that has several."""
    seen: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        seen.setdefault(id(parameter), []).append(name)
    return {names[0]: names for names in seen.values() if len(names) > 1}
