"""Everything that looking for a batch size could move, read before and after.

Weights, buffers, gradients and optimizer state by their bits; random generators; the mode, hooks and
``requires_grad`` of every part; torch's global switches. Does not see what a finder writes to disk.
"""

from __future__ import annotations

import gc
import os
import random
import sys
from collections.abc import Callable
from typing import Any

from pytest_gputrain.trace.digest import tensor_digest, value_digest
from pytest_gputrain.trace.names import named_buffers, named_parameters

# By heading, then by name: digests and plain values.
Reading = dict[str, dict[str, Any]]
_SHOWN = 3
_COUNTED = ("weights", "buffers", "gradients")
_HOOKS = (
    "_forward_hooks",
    "_forward_pre_hooks",
    "_backward_hooks",
    "_backward_pre_hooks",
    "_state_dict_hooks",
)


def read(model: Any, optimizer: Any) -> Reading:
    """The state of a model, of what the case calls its optimizer, and of the process."""
    parameters = named_parameters(model)
    modules = dict(model.named_modules())
    return {
        "weights": {name: tensor_digest(p) for name, p in parameters.items()},
        "buffers": {name: tensor_digest(b) for name, b in named_buffers(model).items()},
        "gradients": {name: tensor_digest(p.grad) for name, p in parameters.items()},
        "requires_grad": {name: p.requires_grad for name, p in parameters.items()},
        "optimizer state": _optimizer(optimizer),
        "train mode": {name or "the model": module.training for name, module in modules.items()},
        "hooks": {name or "the model": _hooks(module) for name, module in modules.items()},
        "random state": _random_state(),
        "global switches": _switches(),
        "environment variables": dict(os.environ),
    }


def in_words(before: Reading, after: Reading) -> str:
    """What is not as it was: "2 of 5 buffers (norm.running_mean, norm.running_var), random state (torch)"."""
    parts = []
    for heading, values in before.items():
        names = [name for name in {**values, **after[heading]} if _differs(values, after[heading], name)]
        if names:
            shown = ", ".join(names[:_SHOWN]) + (", ..." if len(names) > _SHOWN else "")
            count = f"{len(names)} of {len(values)} " if heading in _COUNTED else ""
            parts.append(f"{count}{heading} ({shown})")
    return ", ".join(parts)


def _differs(before: dict[str, Any], after: dict[str, Any], name: str) -> bool:
    return bool(before.get(name, "absent") != after.get(name, "absent"))


def _optimizer(optimizer: Any) -> dict[str, Any]:
    from pytest_gputrain.trace.optimizers import optimizers_in

    found: dict[str, Any] = {}
    for number, inner in enumerate(optimizers_in(optimizer)):
        for index, group in enumerate(inner.param_groups):
            for key, value in group.items():
                found[f"group {index} of {number}, {key}"] = _value(key, value)
        for index, (_, state) in enumerate(inner.state.items()):
            for key, value in state.items() if isinstance(state, dict) else ():
                found[f"{key} of parameter {index}"] = value_digest(value)
    return found


def _value(key: str, value: Any) -> Any:
    return [id(parameter) for parameter in value] if key == "params" else repr(value)


def _hooks(module: Any) -> int:
    return sum(len(getattr(module, name, ())) for name in _HOOKS)


def _random_state() -> dict[str, Any]:
    import torch

    found = {"torch": tensor_digest(torch.get_rng_state()), "random": value_digest(random.getstate())}
    if "numpy" in sys.modules:
        kind, keys, *rest = sys.modules["numpy"].random.get_state()
        found["numpy"] = repr((kind, value_digest(keys), rest))
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        found["torch.cuda"] = tensor_digest(torch.cuda.get_rng_state())
    return found


def _switches() -> dict[str, Any]:
    """torch's process-wide settings, by the name of what reads them."""
    import torch

    readers: dict[str, Callable[[], Any]] = {
        "cudnn.benchmark": lambda: torch.backends.cudnn.benchmark,
        "cudnn.deterministic": lambda: torch.backends.cudnn.deterministic,
        "cudnn.enabled": lambda: torch.backends.cudnn.enabled,
        "cudnn.allow_tf32": lambda: torch.backends.cudnn.allow_tf32,
        "float32 matmul precision": torch.get_float32_matmul_precision,
        "deterministic algorithms": torch.get_deterministic_debug_mode,
        "grad enabled": torch.is_grad_enabled,
        "inference mode": torch.is_inference_mode_enabled,
        "autocast": lambda: [torch.is_autocast_enabled(kind) for kind in ("cpu", "cuda")],
        "autocast cache": torch.is_autocast_cache_enabled,
        "anomaly detection": torch.is_anomaly_enabled,
        "default dtype": torch.get_default_dtype,
        "default device": lambda: str(torch.get_default_device()),
        "number of threads": torch.get_num_threads,
        "garbage collection": lambda: (gc.isenabled(), gc.get_threshold()),
    }
    return {name: reader() for name, reader in readers.items()}
