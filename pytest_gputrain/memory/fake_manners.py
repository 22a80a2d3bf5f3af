"""What programs do with tensors in Python that fake tensors refuse, and the device that they ask for."""

from __future__ import annotations

from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from pytest_gputrain.memory.fake_seam import is_fake
from pytest_gputrain.memory.fake_values import Unanswerable, Values

_DEVICE_FIRST = ("to", "set_default_device")


class FakeManners(TorchFunctionMode):
    """``device="cuda"``, ``.cuda()``, ``.to("cuda:0")`` and ``pin_memory`` give CPU tensors.

    ``f"{loss:.3f}"`` prints a number, ``.numpy()`` gives values where they are known.
    """

    def __init__(self, values: Values) -> None:
        super().__init__()
        self._values = values

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        if name in ("cuda", "pin_memory"):
            return args[0]
        if name == "__format__" and args[0].dim() == 0:
            return format(args[0].item(), args[1])
        if name == "numpy" and is_fake(args[0]):
            return self._numpy(args[0])
        if kwargs:
            kwargs = {key: _on_cpu(value) for key, value in kwargs.items() if key != "pin_memory"}
        if name in _DEVICE_FIRST:
            args = tuple(_on_cpu(one) for one in args)
        return func(*args, **(kwargs or {}))

    def _numpy(self, tensor: Any) -> Any:
        real = self._values.of(tensor)
        if real is None:
            raise Unanswerable("Tensor.numpy")
        return torch.Tensor.numpy(real)


def _on_cpu(value: Any) -> Any:
    if isinstance(value, torch.device) and value.type == "cuda":
        return torch.device("cpu")
    if isinstance(value, str) and (value == "cuda" or value.startswith("cuda:")):
        return "cpu"
    return value
