"""What is to be traced in a rank, read from ``trace=`` and from the environment. Pure: no torch.

Everything here is decided, and refused if it is nonsense, in the process that launches; a rank gets the
plain record.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from pytest_gputrain.values import parse_seconds
from pytest_gputrain.variables import unknown

TRACERS = ("grads", "module_bwd", "ddp_buckets", "heartbeat", "watchdog", "rates")
DEFAULT_TRACERS = ("grads", "ddp_buckets", "heartbeat", "watchdog")
"""What ``trace=True`` means. ``module_bwd`` reads every gradient, for which it waits for the GPU."""

VARIABLES = {
    "grads": "GPUTRAIN_TRACE_GRADS",
    "module_bwd": "GPUTRAIN_TRACE_MODULE_BWD",
    "ddp_buckets": "GPUTRAIN_TRACE_DDP_BUCKETS",
    "heartbeat": "GPUTRAIN_HEARTBEAT",
    "watchdog": "GPUTRAIN_WATCHDOG",
}
GC_RANGE = "GPUTRAIN_GC_RANGE"
STATIC_GRAPH = "GPUTRAIN_DDP_STATIC_GRAPH"
FIND_UNUSED = "GPUTRAIN_DDP_FIND_UNUSED"
FORCE_BRANCH = "GPUTRAIN_FORCE_BRANCH"
WATCHDOG_SECONDS = "GPUTRAIN_WATCHDOG_SECONDS"

_WORDS = {
    **dict.fromkeys(("1", "true", "yes", "on"), True),
    **dict.fromkeys(("0", "false", "no", "off"), False),
}


class SwitchError(ValueError):
    """A switch with a name or a value that means nothing: one line, with what is legal."""


@dataclass(frozen=True, kw_only=True)
class Switches:
    """What a rank is to trace, and what of the script is to be changed.

    tracers: names of ``TRACERS``, written to files of the rank; printed: those that also go to its stdout.
    layers: the layers to checkpoint, half open, None for an open end; None: the script's own way.
    watchdog_seconds: without movement for so long, the stacks are written; None: half the launch's ``stall``.
    """

    tracers: tuple[str, ...] = ()
    printed: tuple[str, ...] = ()
    layers: tuple[int | None, int | None] | None = None
    static_graph: bool = False
    find_unused: bool = False
    branch: str | None = None
    watchdog_seconds: float | None = None

    def __bool__(self) -> bool:
        """Whether there is anything to do."""
        return self != Switches(watchdog_seconds=self.watchdog_seconds)

    def as_record(self) -> dict[str, Any]:
        """Plain data that crosses to the rank."""
        return asdict(self)

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> Switches:
        """The other end of ``as_record``, which JSON has turned tuples into lists on the way to."""
        lists = {name: value for name, value in record.items() if isinstance(value, list)}
        return cls(**{**record, **{name: tuple(value) for name, value in lists.items()}})


def resolve(trace: object, environ: Mapping[str, str], *, default: bool) -> Switches:
    """``trace=`` and the environment together. Raises SwitchError.

    A switch that is on always adds; one that is off takes away only what nobody has asked for by name.
    ``trace=None`` means ``default``.
    """
    if mistaken := unknown(environ):  # misspelt, it would be green and untraced
        raise SwitchError(mistaken)
    said = {name: flag(variable, environ) for name, variable in VARIABLES.items()}
    wanted = tracers_of(default if trace is None else trace)
    if trace is None:
        wanted = {name for name in wanted if said[name] is not False}
    on = {name for name, value in said.items() if value}
    return Switches(
        tracers=tuple(name for name in TRACERS if name in wanted | on),
        printed=tuple(name for name in ("grads", "module_bwd", "ddp_buckets") if name in on),
        layers=layer_range(environ.get(GC_RANGE, "")),
        static_graph=flag(STATIC_GRAPH, environ) or False,
        find_unused=flag(FIND_UNUSED, environ) or False,
        branch=environ.get(FORCE_BRANCH, "").strip() or None,
        watchdog_seconds=_seconds(environ.get(WATCHDOG_SECONDS, "")),
    )


def tracers_of(trace: object) -> set[str]:
    """The tracers that a ``trace=`` argument asks for. Raises SwitchError."""
    if isinstance(trace, bool):
        return set(DEFAULT_TRACERS) if trace else set()
    if isinstance(trace, Mapping):
        if all(name in TRACERS and isinstance(on, bool) for name, on in trace.items()):
            kept = {name for name in DEFAULT_TRACERS if trace.get(name, True)}
            return kept | {name for name, on in trace.items() if on}
    else:
        names = [trace] if isinstance(trace, str) else list(trace) if isinstance(trace, Iterable) else [trace]
        if all(isinstance(name, str) and name in TRACERS for name in names):
            return set(names)
    raise SwitchError(
        f"trace={trace!r}: must be True, False, names, or a mapping of names to True or False; "
        f"the names are {', '.join(map(repr, TRACERS))}"
    )


def flag(variable: str, environ: Mapping[str, str]) -> bool | None:
    """A switch of the environment; None when it is not set, or empty. Raises SwitchError."""
    text = environ.get(variable, "").strip()
    if not text:
        return None
    if text.lower() not in _WORDS:
        raise SwitchError(f"{variable}={text!r}: must be one of {', '.join(_WORDS)}")
    return _WORDS[text.lower()]


def layer_range(text: str) -> tuple[int | None, int | None] | None:
    """``start:end`` with open ends; None when empty. Raises SwitchError."""
    text = text.strip()
    if not text:
        return None
    start, colon, end = (part.strip() for part in text.partition(":"))
    ends = [int(part) if part.isdecimal() else None for part in (start, end)]
    bad = any(part and not part.isdecimal() for part in (start, end))
    if not colon or bad or (None not in ends and ends[0] >= ends[1]):  # type: ignore[operator]
        raise SwitchError(
            f"{GC_RANGE}={text!r}: must be start:end with start below end, counted from 0 and without end "
            "itself; either may be left out, such as 0:4, 2: or :"
        )
    return ends[0], ends[1]


def _seconds(text: str) -> float | None:
    try:
        return parse_seconds(text) if text.strip() else None
    except ValueError as error:
        raise SwitchError(f"{WATCHDOG_SECONDS}: {error}") from None
