"""What a measured peak depends on, as a JSON value: discoveries with the same key have the same memory curve.

Covered: the model's configuration, modules, parameter shapes and dtypes, and the code of its classes; the
optimizer's class and those of its settings that change memory; the batch's structure; the code of the loop's
functions; dtype, autocast and attention settings; compiling; ranks; the GPU by name and memory; torch and
this package. Not in it, because it is applied afterwards: margin, capacity, bounds.
Imports no torch at the top.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from pytest_gputrain.batch.cache import VERSION
from pytest_gputrain.batch.code_digest import code_digest
from pytest_gputrain.batch.stable_text import fields_of, plain, text

if TYPE_CHECKING:
    import torch

# These change what is computed, not what is kept for it. A learning rate may be a tensor or zero in warm-up.
_NOT_MEMORY = ("params", "lr", "initial_lr", "param_names")
_ALLOCATOR = ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF", "PYTORCH_NO_CUDA_MEMORY_CACHING")
LEGAL_COMPONENTS = "text, numbers, True, False, None, dtypes, and lists, tuples or mappings of these"


def cache_key(
    model: torch.nn.Module,
    *,
    device: torch.device | str,
    optimizer: torch.optim.Optimizer | None = None,
    batch: Any = None,
    max_seq_len: int | None = None,
    compiled: bool = False,
    world_size: int = 1,
    functions: Iterable[Callable[..., Any]] = (),
    settings: Mapping[str, object] | None = None,
    components: object = None,
) -> dict[str, Any]:
    """Return the key of a discovery.

    batch: one batch of a batch size that is always the same, drawn with the seed that is always the same.
    functions: the case's (``functions_of``). settings: further things that decide about memory, such as the
    evaluation's batch factor and the number of iterations. components: the user's ``cache_key_components``.
    Raises ValueError with one line for components that JSON cannot hold.
    """
    import torch

    from pytest_gputrain import __version__

    return {
        "format": VERSION,
        "model": describe_model(model),
        "optimizer": None if optimizer is None else describe_optimizer(optimizer),
        "batch": _digest(_structure(batch)),
        "max_seq_len": max_seq_len,
        "functions": code_digest(functions),
        "compiled": compiled,
        "world_size": world_size,
        "settings": _jsonable(settings or {}, "settings"),
        "components": _jsonable(components, "cache_key_components"),
        "arithmetic": _arithmetic(torch.device(device).type),
        "device": describe_device(torch.device(device)),
        "torch": torch.__version__,
        "pytest_gputrain": __version__,
    }


def functions_of(case: Any) -> list[Callable[..., Any]]:
    """The functions of a case that run in a probe. Not its optimizer: that is described as what it built, and
    another learning rate is no other memory.
    """
    names = ("model", "batch", "loss", "num_targets", "split", "step", "wrap", "compile")
    return [function for name in names if (function := getattr(case, name)) is not None]


def describe_model(model: torch.nn.Module) -> dict[str, Any]:
    """Class, configuration, and digests of parameters, modules and the code of their classes."""
    tensors = [*model.named_parameters(), *model.named_buffers()]
    shapes = [(name, [*t.shape], str(t.dtype), t.requires_grad) for name, t in tensors]
    modules = [*model.named_modules()]
    return {
        "class": f"{type(model).__module__}.{type(model).__qualname__}",
        "config": _digest(_configuration(model)),
        "num_parameters": sum(parameter.numel() for parameter in model.parameters()),
        "parameters": _digest(shapes),
        "modules": _digest([(name, _module(module)) for name, module in modules]),
        "code": code_digest(_code(model)),
    }


def describe_optimizer(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Class, and of each group what changes memory, with how many values it moves."""
    groups = [
        {
            **{name: _setting(value) for name, value in sorted(group.items()) if name not in _NOT_MEMORY},
            "num_values": sum(parameter.numel() for parameter in group["params"]),
        }
        for group in optimizer.param_groups
    ]
    name = f"{type(optimizer).__module__}.{type(optimizer).__qualname__}"
    return {"class": name, "groups": _digest(groups)}


def describe_device(device: torch.device) -> dict[str, Any]:
    """Kind, and of a GPU its name and total memory in bytes: a CPU's peaks are counted, whatever it is."""
    import torch

    if device.type != "cuda":
        return {"kind": device.type}
    properties = torch.cuda.get_device_properties(device)
    return {"kind": "cuda", "name": properties.name, "total_bytes": properties.total_memory}


def _configuration(model: Any) -> list[str]:
    """Of ``model.config`` or its like everything, whatever its class."""
    found = [getattr(model, name, None) for name in ("config", "cfg", "args", "hparams")]
    return [text(fields_of(config)) for config in found if config is not None]


def _module(module: torch.nn.Module) -> list[Any]:
    """Class and plain attributes: what a switch such as ``gradient_checkpointing = True`` leaves."""
    held = {name: plain(value) for name, value in vars(module).items() if _is_setting(name)}
    attributes = sorted((name, text) for name, text in held.items() if text is not None)
    return [f"{type(module).__module__}.{type(module).__qualname__}", attributes]


def _is_setting(name: str) -> bool:
    return not name.startswith("_") and name != "training"  # a probe sets the mode itself


def _code(model: torch.nn.Module) -> Iterator[Any]:
    """The classes of a model's modules, and the functions that somebody put on single ones."""
    for cls in {type(module): None for module in model.modules()}:
        if not cls.__module__.startswith("torch."):
            yield cls
    for module in model.modules():
        yield from (value for value in vars(module).values() if callable(value))
        yield from (*module._forward_pre_hooks.values(), *module._forward_hooks.values())


def _setting(value: object) -> str:
    """Of an optimizer's number only whether it is zero: that decides whether there is state for it."""
    if isinstance(value, float):
        return "0.0" if value == 0 else "a number"
    return repr([*map(_setting, value)]) if isinstance(value, tuple | list) else text(value)


def _structure(batch: Any) -> list[Any]:
    from pytest_gputrain.case import pytree

    return [
        (path, [*leaf.shape], str(leaf.dtype)) if pytree.is_tensor(leaf) else (path, type(leaf).__qualname__)
        for path, leaf in pytree.leaves(batch)
    ]


def _arithmetic(kind: str) -> dict[str, Any]:
    """Switches of torch that decide which kernels run, and what these need."""
    import torch

    autocast = str(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else None
    return {
        "default_dtype": str(torch.get_default_dtype()),
        "autocast": autocast,
        "attention": [
            torch.backends.cuda.flash_sdp_enabled(),
            torch.backends.cuda.mem_efficient_sdp_enabled(),
            torch.backends.cuda.math_sdp_enabled(),
        ],
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "allocator": {name: os.environ[name] for name in _ALLOCATOR if os.environ.get(name)},
    }


def _jsonable(value: object, what: str) -> Any:
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return repr(value)  # nan and infinity too
    if isinstance(value, Mapping):
        return {str(name): _jsonable(held, what) for name, held in value.items()}
    if isinstance(value, tuple | list):
        return [_jsonable(held, what) for held in value]
    if (type(value).__module__, type(value).__name__) in (("torch", "dtype"), ("torch", "device")):
        return str(value)
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    raise ValueError(f"{what}: {value!r:.60} is a {type(value).__name__}; give {LEGAL_COMPONENTS}")


def _digest(value: object) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()
