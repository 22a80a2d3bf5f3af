"""Parameter names as the user wrote them, whatever the model is wrapped in, and who owns them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

# Wrappers put these into names, in the middle too (a compiled or checkpointed block inside a model).
_WRAPPER_PARTS = frozenset({"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"})


@dataclass(frozen=True)
class Owner:
    """The module that holds a parameter: its path ("" is the model itself) and its class."""

    path: str
    kind: str

    def __str__(self) -> str:
        return f"in {self.path}, {self.kind}" if self.path else f"in the model itself, {self.kind}"


def canonical_name(name: str) -> str:
    """The name without what wrappers put into it."""
    return ".".join(part for part in name.split(".") if part not in _WRAPPER_PARTS)


def inner_model(model: Any) -> Any:
    """The user's module inside data-parallel and compile wrappers."""
    from torch.nn.parallel import DataParallel, DistributedDataParallel

    while True:
        if isinstance(model, DistributedDataParallel | DataParallel):
            model = model.module
        elif "_orig_mod" in getattr(model, "_modules", {}):
            model = model._orig_mod
        else:
            return model


def named_parameters(model: Any) -> dict[str, Any]:
    """Every parameter once, tied ones under their first name."""
    return {canonical_name(name): parameter for name, parameter in inner_model(model).named_parameters()}


def named_buffers(model: Any) -> dict[str, Any]:
    return {canonical_name(name): buffer for name, buffer in inner_model(model).named_buffers()}


def hidden_parameters(model: Any) -> dict[str, Any]:
    """Parameters that modules keep where torch does not look: in lists, tuples and dicts."""
    from torch import nn

    inner = inner_model(model)
    registered = {id(parameter) for parameter in inner.parameters()}
    found: dict[str, Any] = {}

    def search(value: Any, path: str, depth: int) -> None:
        if isinstance(value, nn.Parameter):
            if id(value) not in registered:
                found.setdefault(path, value)
        elif isinstance(value, nn.Module):
            for name, parameter in value.named_parameters(prefix=path):
                if id(parameter) not in registered:
                    found.setdefault(name, parameter)
        elif isinstance(value, list | tuple | dict) and depth:
            for key, item in value.items() if isinstance(value, dict) else enumerate(value):
                search(item, f"{path}[{key!r}]", depth - 1)

    torchs_own = set(vars(nn.Module()))
    for module_name, module in inner.named_modules():
        for name, value in vars(module).items():
            if isinstance(value, list | tuple | dict) and name not in torchs_own:
                search(value, f"{module_name}.{name}".lstrip("."), 2)
    return found


def owners(model: Any) -> dict[str, Owner]:
    """The owning module of every parameter, by the parameter's name."""
    found: dict[str, Owner] = {}
    inner = inner_model(model)
    modules = dict(inner.named_modules())
    for name, _ in inner.named_parameters():
        path = name.rpartition(".")[0]
        kind = type(modules[path]).__name__ if path in modules else "parametrization"
        found[canonical_name(name)] = Owner(canonical_name(path), kind)
    return found
