"""What may be asked of a launch, checked before any rank starts. One line an error: given, legal, way out."""

from __future__ import annotations

import importlib.util
import math
import numbers
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from ..devices.inventory import FAKE_VARIABLE, discover
from ..devices.sharing import gpus_to_share, label
from ..devices.shortage import count, describe_found
from ..devices.visible import visible_gpus
from ..trace import switches
from ..variables import PREFIX
from . import surroundings
from .errors import LaunchUsageError, TooFewGpus, UnsupportedPlatform
from .surroundings import reads

DEVICES = ("cpu", "cuda")
BACKENDS = ("gloo", "nccl", "cpu:gloo,cuda:nccl")
ISOLATIONS = ("fresh", "warm")


@dataclass(frozen=True, kw_only=True)
class LaunchDefaults:
    """What a launch uses where the call does not say. Times in seconds.

    ``artifacts`` is the folder that gets one sub-folder a launch; None means a temporary one, which lives
    as long as the ``LaunchResult``. ``gpus`` are the UUIDs or indices that ranks may see; empty means all.
    With ``share_gpu``, ranks that outnumber the GPUs share them through gloo, and the result says so.
    """

    timeout: float = 300.0
    stall: float = 60.0
    device: str = "cpu"
    artifacts: Path | None = None
    gpus: tuple[str, ...] = ()
    share_gpu: bool = False


class Placement(NamedTuple):
    """Where ranks run and how they talk; ``shared_gpu`` is the label of ranks that share GPUs, else None."""

    device: str
    backend: str
    shared_gpu: str | None = None


def whole(name: str, value: object, *, least: int = 1, most: int | None = None) -> int:
    """An integer of at least ``least``. Raises LaunchUsageError."""
    legal = f"an integer of at least {least}" if most is None else f"an integer from {least} to {most}"
    good = isinstance(value, numbers.Integral) and not isinstance(value, bool)
    if not good or int(value) < least or (most is not None and int(value) > most):  # type: ignore[call-overload]
        raise LaunchUsageError(f"{name}={value!r}: must be {legal}")
    return int(value)  # type: ignore[call-overload, no-any-return]


def seconds(name: str, value: object) -> float:
    """A positive, finite number of seconds. Raises LaunchUsageError."""
    good = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not good or not math.isfinite(value) or value <= 0:  # type: ignore[arg-type, operator]
        raise LaunchUsageError(
            f"{name}={value!r}: must be a positive number of seconds; every launch has an end, "
            f"so give a large number rather than none"
        )
    return float(value)  # type: ignore[arg-type]


def one_of(name: str, value: object, legal: tuple[str, ...]) -> str:
    """One of the legal words. Raises LaunchUsageError."""
    if not isinstance(value, str) or value not in legal:
        raise LaunchUsageError(f"{name}={value!r}: must be one of {', '.join(map(repr, legal))}")
    return value


def placement(
    device: object, backend: object, ranks: int, environ: Mapping[str, str], *, share_gpu: bool
) -> Placement:
    """The device and the backend that fits it. Raises LaunchUsageError, also for more ranks than GPUs.

    ``environ`` is that of the ranks: its CUDA_VISIBLE_DEVICES counts.
    """
    where = one_of("device", device, DEVICES)
    how = one_of("backend", backend or ("nccl" if where == "cuda" else "gloo"), BACKENDS)
    if where == "cpu" and how != "gloo":
        raise LaunchUsageError(f"backend={how!r} needs device='cuda'; on device='cpu' use backend='gloo'")
    if where == "cpu":
        return Placement(where, how)
    shared = gpus_to_share(ranks, None, environ) if share_gpu else ()
    if shared and backend not in (None, "gloo"):
        raise LaunchUsageError(
            f"backend={how!r}: NCCL refuses two ranks on one GPU, and {ranks} ranks share "
            f"{count(len(shared))} here (--share-gpu); leave backend out or give 'gloo'"
        )
    enough_gpus(len(shared) or ranks, environ)
    return Placement(where, "gloo", label(ranks, shared)) if shared else Placement(where, how)


def enough_gpus(ranks: int, environ: Mapping[str, str]) -> None:
    """Raises LaunchUsageError when there are fewer GPUs than ranks, or only pretended ones."""
    num_gpus = len(visible_gpus(discover(environ), environ))
    if num_gpus < ranks:
        found = describe_found(environ)
        raise TooFewGpus(
            f"{ranks} ranks on device='cuda' need {count(ranks)}, found {found}; "
            "use fewer ranks, device='cpu', or mark the test requires_gpus so that it skips",
            f"{count(ranks)}, found {found}",
        )
    if environ.get(FAKE_VARIABLE):
        raise LaunchUsageError(
            f"GPUs found here are pretended ({FAKE_VARIABLE}={environ[FAKE_VARIABLE]}): tests select and "
            "skip by them, but nothing can run on them; use device='cpu'"
        )


def environment(given: object) -> dict[str, str]:
    """The environment of the ranks: this process's own, with ``env`` on top; None removes a variable."""
    environ = surroundings.own()
    if given is None:
        return environ
    if not isinstance(given, Mapping):
        raise LaunchUsageError(
            f"env={given!r}: must be a mapping of names to strings (None removes a variable)"
        )
    for name, value in given.items():
        if value is None:
            environ.pop(name, None)
        elif isinstance(name, str) and isinstance(value, str):
            environ[name] = value
        else:
            raise LaunchUsageError(
                f"env[{name!r}]={value!r}: names and values must be strings; write {str(value)!r}"
            )
    return environ


def tracing(trace: object, environ: Mapping[str, str], *, default: bool) -> dict[str, object] | None:
    """What the ranks are to trace, by ``trace=`` and the switches in their environment; None for nothing.

    Raises LaunchUsageError.
    """
    try:
        if trace is None and not default:
            return _tracing_by_environment(environ)
        found = switches.resolve(trace, environ, default=default)
    except switches.SwitchError as error:
        raise LaunchUsageError(str(error)) from None
    return found.as_record() if found else None


@reads(lambda name: name.startswith(PREFIX))
def _tracing_by_environment(environ: Mapping[str, str]) -> dict[str, object] | None:
    found = switches.resolve(None, environ, default=False)
    return found.as_record() if found else None


def script_or_module(given: object, module: bool, *, way: str = "module=True") -> str:
    """A script's path as given (it is ``sys.argv[0]``) or the name of a module. Raises LaunchUsageError.

    ``way`` is how the caller's user says that it is a module.
    """
    if not isinstance(given, (str, os.PathLike)):
        raise LaunchUsageError(
            f"script={given!r}: must be a path to a Python script, or a module name with {way}"
        )
    text = os.fspath(given)
    if module:
        if not _module_exists(text):
            raise LaunchUsageError(
                f"module {text!r} cannot be found from {os.getcwd()}; check its name and PYTHONPATH"
            )
        return text
    path = Path(text)
    if not path.is_file():
        why = "is a folder" if path.is_dir() else "does not exist"
        hint = f"; for a module give {way}" if "/" not in text and not text.endswith(".py") else ""
        raise LaunchUsageError(
            f"script {str(path.absolute())!r} {why}; give the path of a Python script{hint}"
        )
    if not os.access(path, os.R_OK):
        raise LaunchUsageError(f"script {str(path.absolute())!r} cannot be read; check its permissions")
    return text


def _module_exists(name: str) -> bool:
    # The ranks' search path is a new interpreter's: the working directory first.
    sys.path.insert(0, os.getcwd())
    try:
        return importlib.util.find_spec(name) is not None
    except (ImportError, ValueError):
        return False
    finally:
        sys.path.remove(os.getcwd())


def linux() -> None:
    """Raises UnsupportedPlatform where ranks cannot be started."""
    if not sys.platform.startswith("linux"):
        raise UnsupportedPlatform(f"launching ranks needs Linux, this is {sys.platform!r}; run it there")
