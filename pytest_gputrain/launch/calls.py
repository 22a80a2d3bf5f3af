"""In a rank: an own record of the collectives that Python calls, in a file that outlives the rank.

torch's flight recorder (``flight.py``) knows more, but dies with the process, cannot be read while a thread
holds the interpreter for ever, and knows no point-to-point operation on gloo. So each call of a process
group's method also leaves a line in a ring of fixed slots, mapped into memory: what a rank did last is there
after SIGKILL. What C++ calls (DDP's buckets) is seen by the flight recorder alone.
"""

from __future__ import annotations

import itertools
import json
import mmap
import os
import struct
import sys
import time
from typing import Any

from . import stacks

FILE = "calls.ring"
SLOTS, SLOT, GROUPS = 2000, 512, 64 << 10
"""2000 calls of at most 512 bytes behind 64 KiB for the groups' ranks; untouched pages cost nothing."""
FIRST = struct.Struct("=Q")
"""At the very start: the number of the first call that counts; those before it are of an earlier launch."""
NAMES = {
    "allreduce": "all_reduce", "allreduce_coalesced": "all_reduce_coalesced", "allgather": "all_gather",
    "all_gather_base": "all_gather_into_tensor", "_allgather_base": "all_gather_into_tensor",
    "allgather_base": "all_gather_into_tensor", "_reduce_scatter_base": "reduce_scatter_tensor",
    "reduce_scatter_base": "reduce_scatter_tensor", "alltoall": "all_to_all",
    "alltoall_base": "all_to_all_single", "allgather_coalesced": "all_gather_coalesced",
    "broadcast": "broadcast", "reduce": "reduce", "gather": "gather", "scatter": "scatter",
    "reduce_scatter": "reduce_scatter", "barrier": "barrier", "monitored_barrier": "monitored_barrier",
    "all_gather_single": "all_gather_into_tensor", "reduce_scatter_single": "reduce_scatter_tensor",
    "all_to_all_single": "all_to_all_single", "send": "send", "recv": "recv", "recv_anysource": "recv",
}  # fmt: skip
"""Methods of a process group, and torch.distributed's names for them."""
_INPUT_SECOND = ("allgather", "_allgather_base", "gather", "scatter", "reduce_scatter",
                 "_reduce_scatter_base", "alltoall", "alltoall_base", "allgather_coalesced",
                 "all_gather_single", "reduce_scatter_single", "all_to_all_single")  # fmt: skip
"""Methods whose first argument is where the output goes."""

_ROOTED = ("broadcast", "reduce", "gather", "scatter")

_path: str | None = None
_ring: _Ring | None = None


class _Ring:
    """The file, mapped. Made at the first collective of a process."""

    def __init__(self, path: str) -> None:
        self.pid = os.getpid()
        self._numbers = itertools.count()
        self._groups: dict[str, list[int]] = {}
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o644)
        try:
            os.ftruncate(fd, GROUPS + SLOTS * SLOT)
            self._map = mmap.mmap(fd, GROUPS + SLOTS * SLOT)
        finally:
            os.close(fd)

    def group(self, name: str) -> list[int]:
        """The global ranks of a group; written down when it is first seen."""
        if (known := self._groups.get(name)) is None:
            import torch.distributed.distributed_c10d as c10d

            names = c10d._world.pg_names
            known = next(
                (sorted(r) for g, r in c10d._world.pg_group_ranks.items() if names.get(g) == name), []
            )
            self._groups[name] = known
            text = json.dumps(self._groups).encode() + b"\n"
            if len(text) <= GROUPS - FIRST.size:
                self._map[FIRST.size : FIRST.size + len(text)] = text
        return known

    def start_anew(self) -> None:
        """What is in it counts no more."""
        FIRST.pack_into(self._map, 0, next(self._numbers) + 1)

    def add(self, record: dict[str, Any]) -> None:
        """Writes a record into the next slot."""
        number = record["n"] = next(self._numbers)
        text = json.dumps(record).encode()
        if len(text) >= SLOT:  # hundreds of tensors in one call, or a very long path
            record["sizes"], record["location"] = record["sizes"][:4], (record["location"] or "")[-200:]
            text = json.dumps(record).encode()[: SLOT - 1]
        start = GROUPS + number % SLOTS * SLOT
        self._map[start : start + SLOT] = text.ljust(SLOT, b"\n")


def prepare() -> None:
    """Puts the recording around the methods of torch's ``ProcessGroup``; once, in the server."""
    from torch.distributed import ProcessGroup

    for name in NAMES:
        if (method := getattr(ProcessGroup, name, None)) is not None:
            setattr(ProcessGroup, name, _recording(name, method))


def place(path: str) -> None:
    """Where this process's ring is to be."""
    global _path, _ring
    _path, _ring = path, None


def start_anew() -> None:
    """The calls so far were of another launch: a kept rank's ring is made once."""
    if _ring is not None:
        _ring.start_anew()


def _recording(name: str, method: Any) -> Any:
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        note(name, self, args)
        return method(self, *args, **kwargs)

    call.__doc__, call.__name__ = method.__doc__, name
    # Not the user's code and not the rank's. pybind recognises a method that calls itself by this name.
    call.__code__ = call.__code__.replace(co_filename="<string>", co_name=name)
    return call


def note(name: str, group: Any, args: tuple[Any, ...]) -> None:
    """Leaves a line about a call; never raises, whatever stands in for a tensor or a group."""
    global _ring
    try:
        if _ring is None:
            if _path is None:
                return
            _ring = _Ring(_path)
        if _ring.pid == os.getpid():  # a process that the rank forked has collectives of its own
            _ring.add(_described(name, group, args, _ring))
    except Exception:  # full disk, fake groups: a record is never worth a failure
        return


def _described(name: str, group: Any, args: tuple[Any, ...], ring: _Ring) -> dict[str, Any]:
    tensors = _tensors(args[1] if name in _INPUT_SECOND and len(args) > 1 else args[0] if args else ())
    label = group.group_name
    ranks = ring.group(label)
    record = {
        "seq": group._get_sequence_number_for_group() + 1,
        "op": NAMES[name],
        "sizes": [list(tensor.shape) for tensor in tensors[:16]],
        "dtypes": [str(tensor.dtype).removeprefix("torch.") for tensor in tensors[:16]],
        "group": label,
        "location": _caller(),
        "at": time.time(),
    }
    root = getattr(args[-1], "rootRank", None) if args else None
    if name in _ROOTED and root is not None:
        record["root"] = ranks[root]
    if name in ("send", "recv", "recv_anysource"):
        me = ranks[group.rank()]
        other = ranks[args[1]] if name != "recv_anysource" else -1
        record |= {"seq": None, "ranks": [me, other] if name == "send" else [other, me]}
    return record


def _tensors(given: Any) -> list[Any]:
    """The tensors in an argument, in whatever lists they are."""
    if isinstance(given, (list, tuple)):
        return [tensor for part in given for tensor in _tensors(part)]
    return [given] if hasattr(given, "shape") and hasattr(given, "dtype") else []


def _caller() -> str | None:
    frames = []
    frame = sys._getframe(1)
    while frame is not None:
        frames.append(stacks.Frame(frame.f_code.co_filename, frame.f_lineno, frame.f_code.co_name))
        if stacks.is_users(frames[-1].file):
            break
        frame = frame.f_back  # type: ignore[assignment]
    found = stacks.user_frame(frames)
    return str(found) if found else None
