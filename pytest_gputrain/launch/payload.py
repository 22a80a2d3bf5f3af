"""Functions to ranks and values back.

A function travels by cloudpickle. Modules that pytest has rewritten (test modules, conftest) travel by
value, so that a rank needs not be able to import them and its assertions still say ``assert 6 == (3 * 7)``;
modules of the installed world travel by name.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import pickle
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import CodeType, ModuleType
from typing import Any

import cloudpickle

from .errors import LaunchUsageError

_NO_FILE = "<dynamic-code>"
"""What newer cloudpickle writes in its place."""


def pack_call(target: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> bytes:
    """A call as bytes. Raises LaunchUsageError, with the object that is in the way, if it cannot travel."""
    return pack_by_value((target, tuple(args), dict(kwargs)), getattr(target, "__qualname__", repr(target)))


def pack_by_value(value: object, name: str = "a value") -> bytes:
    """Anything as bytes, with test modules by value. Raises LaunchUsageError, naming it by ``name``."""
    try:
        with _by_value(_rewritten_modules()):
            return dumps(value)
    except Exception:  # pickling runs foreign code; a global of the test module may refuse
        try:
            return dumps(value)
        except Exception as error:
            raise LaunchUsageError(
                f"{name} cannot be sent to the ranks: {type(error).__name__}: {_one_line(error)}; "
                "create what cannot be pickled (locks, files, sockets, CUDA tensors) inside the function"
            ) from None


def unpack_call(data: bytes) -> tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]]:
    """The other end of ``pack_call``, in a rank."""
    target, args, kwargs = pickle.loads(data)
    return target, args, kwargs


def pack_value(value: Any) -> bytes:
    """A rank's return value as bytes, every tensor in it on CPU. Raises whatever pickling raises."""
    buffer = io.BytesIO()
    _ValuePickler(buffer, protocol=pickle.HIGHEST_PROTOCOL).dump(value)
    return buffer.getvalue()


def unpack_value(data: bytes) -> Any:
    """The other end of ``pack_value``, in the process that launched."""
    return pickle.loads(data) if data else None


class _CallPickler(cloudpickle.Pickler):  # type: ignore[misc]  # cloudpickle has no types
    """cloudpickle, and modules that have made themselves of another class, as ``torch._dynamo.config``.

    A function keeps the name of its file, by which causes are told: cloudpickle leaves it out from 3.1.3 on.
    """

    def reducer_override(self, obj: Any) -> Any:
        if isinstance(obj, CodeType):
            make, given = self.dispatch_table[CodeType](obj)
            return make, tuple(obj.co_filename if one == _NO_FILE else one for one in given)
        if isinstance(obj, ModuleType) and type(obj) is not ModuleType:
            name = obj.__name__
            if sys.modules.get(name) is obj:
                return importlib.import_module, (name,)
        return super().reducer_override(obj)


class _ValuePickler(_CallPickler):
    """The same, so that classes of a test module come back as themselves, with tensors moved to CPU."""

    def reducer_override(self, obj: Any) -> Any:
        torch = sys.modules.get("torch")
        if torch is not None and isinstance(obj, torch.Tensor) and obj.device.type not in ("cpu", "meta"):
            moved = obj.detach().cpu().requires_grad_(obj.requires_grad)
            return moved.__reduce_ex__(pickle.HIGHEST_PROTOCOL)
        return super().reducer_override(obj)


def dumps(value: object) -> bytes:
    """A value as bytes that ``pickle.loads`` takes. Raises whatever pickling raises."""
    buffer = io.BytesIO()
    _CallPickler(buffer, protocol=pickle.HIGHEST_PROTOCOL).dump(value)
    return buffer.getvalue()


_seen: tuple[int, object, list[ModuleType]] = (0, None, [])


def _rewritten_modules() -> list[ModuleType]:
    """Test modules and conftests: what pytest's import hook has loaded, installed plugins aside."""
    global _seen
    # The module itself, for another may come under the same name: a session after a session in one process.
    num, last = len(sys.modules), next(reversed(sys.modules.values()))
    if _seen[0] != num or _seen[1] is not last:  # looking at two thousand takes longer than sending a call
        found = [module for module in list(sys.modules.values()) if _is_rewritten(module)]
        _seen = (num, last, found)
    return _seen[2]


def _is_rewritten(module: ModuleType) -> bool:
    loader = getattr(getattr(module, "__spec__", None), "loader", None)
    return (
        type(loader).__name__ == "AssertionRewritingHook"
        and "-packages" not in (getattr(module, "__file__", None) or "")
        and module.__name__.partition(".")[0] != "pytest_gputrain"
    )


@contextlib.contextmanager
def _by_value(modules: Sequence[ModuleType]) -> Iterator[None]:
    already = cloudpickle.list_registry_pickle_by_value()
    added = [module for module in modules if module.__name__ not in already]
    for module in added:
        cloudpickle.register_pickle_by_value(module)
    try:
        yield
    finally:
        for module in added:
            cloudpickle.unregister_pickle_by_value(module)


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200]
