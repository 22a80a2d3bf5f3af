"""In a rank: answers, when asked, which collectives this rank has entered; asks nothing of the rank itself.

torch keeps the records (its flight recorder, a ring of 2000, gloo and NCCL). A thread that sleeps in
``accept`` reads them while the main thread waits in C. It starts with the first process group, since from
then on the process has threads anyway, and costs nothing while nobody asks.

**The form of a record**, also in ``artifacts/rank{r}/collectives.json`` of a launch that ended badly (a JSON
list, oldest first)::

    {"seq": 7,                      # number within its group, from 1; null for point-to-point
     "op": "all_reduce",            # torch.distributed's name, without the backend
     "sizes": [[128]],              # of the input tensors
     "dtypes": ["float32"],
     "group": "0",                  # torch's name of the group; "0" is the default group
     "ranks": [0, 1],               # global ranks of the group; [sender, receiver] for point-to-point
     "state": "waiting",            # or "done"
     "location": "train.py:57 in step",   # the user's line, or null
     "at": 1795887670.6,            # when it was called: seconds since the epoch, or null
     "note": "in backward",         # or null; "in backward" for DDP's buckets
     "root": 0}                     # global rank of the source or destination, where Python gave one
"""

from __future__ import annotations

import _thread
import contextlib
import json
import os
import signal
import socket
import struct
import sys
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from . import calls, flight, stacks

KEPT = 2000
"""Collectives kept a rank: some hundred steps of DDP, less than 2 MB."""
TEXT = 200
"""Characters of an exception's message that are told."""
LAST = "calls.last"
"""In the rank's folder: the answer of a rank that has left, until the launch is over."""

_place: tuple[str, int] | None = None
_folder: str | None = None
_listener: tuple[int, socket.socket] | None = None


def address(mark: str, rank: int) -> str:
    """Where the rank listens: a name in Linux's abstract namespace, which is gone with the process."""
    return f"\0gputrain-{mark}-{rank}"


def prepare() -> None:
    """Once, in the server, so that no rank pays for it: hooks into the making of process groups."""
    import torch.distributed.distributed_c10d as c10d

    original = getattr(c10d, "_new_process_group_helper", None)
    if original is None or hasattr(original, "__wrapped__"):
        return

    def _new_process_group_helper(*args: Any, **kwargs: Any) -> Any:
        with contextlib.suppress(Exception):  # no record is no reason to fail
            start()
            flight.remember(*args, **kwargs)
        return original(*args, **kwargs)

    _new_process_group_helper.__wrapped__ = original  # type: ignore[attr-defined]
    # On the rank's stack, and neither the user's nor the rank's own code.
    code = _new_process_group_helper.__code__
    _new_process_group_helper.__code__ = code.replace(co_filename="<string>")
    c10d._new_process_group_helper = _new_process_group_helper
    calls.prepare()


def place(folder: str, mark: str | None, rank: int) -> None:
    """Says which rank of which launch this process is; a kept rank says it again for every launch."""
    global _place, _folder
    _place, _folder = (mark, rank) if mark else None, folder
    calls.place(os.path.join(folder, calls.FILE))
    set_debug_level()
    if _listener is not None and _listener[0] == os.getpid():
        start()


def set_debug_level() -> None:
    """torch's, from this rank's environment: torch read it when the server started.

    INFO where nobody has set one, so that DDP's error names the parameters that it waits for; it looks their
    names up only when it raises.
    """
    if (dist := sys.modules.get("torch.distributed")) is None:
        return
    if "TORCH_DISTRIBUTED_DEBUG" in os.environ:
        dist.set_debug_level_from_env()
    else:
        dist.set_debug_level(dist.DebugLevel.INFO)


def start() -> None:
    """Starts to record and to answer. Harmless when it is on already."""
    global _listener
    if _place is None:
        return
    if _listener is not None and _listener[0] == os.getpid():
        if _listener[1].getsockname() == address(*_place).encode():
            return
        _listener[1].shutdown(socket.SHUT_RDWR)  # its thread ends
    _record()
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(address(*_place))
    listener.listen(4)
    _listener = (os.getpid(), listener)
    # A thread of the interpreter's lowest kind, invisible to threading.enumerate(), which takes no signals.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
    try:
        _thread.start_new_thread(_serve, (listener,))
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _record() -> None:
    """Turns the flight recorder on. It reads its size once; the user's environment stays as it was."""
    name = "TORCH_FR_BUFFER_SIZE"
    if name in os.environ:
        return
    os.environ[name] = str(KEPT)
    try:
        flight.entries()
    finally:
        del os.environ[name]


def called(target: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[Any, str | None]:
    """(what the user's function returned, the line at which it did): a hang may be that it came there.

    The interpreter tells of the first call alone, and the frame lets go of its variables at once.
    """
    frames: list[Any] = []
    before = sys.getprofile()

    def first(frame: Any, event: str, argument: Any) -> None:
        if event == "call":
            sys.setprofile(before)
            frames.append(frame)

    sys.setprofile(first)
    try:
        value = target(*args, **kwargs)
    finally:
        if not frames:
            sys.setprofile(before)
    if not frames:
        return value, None
    frame = frames.pop()
    location = stacks.Frame(frame.f_code.co_filename, frame.f_lineno, frame.f_code.co_name)
    with contextlib.suppress(RuntimeError):  # a generator's frame goes on
        frame.clear()
    return value, str(location) if stacks.is_users(location.file) else None


def _serve(listener: socket.socket) -> None:
    with listener:
        while True:
            try:
                asker, _ = listener.accept()
            except OSError:
                return
            with asker, contextlib.suppress(Exception):  # the next answer may do better
                if _is_mine(asker):
                    asker.sendall(json.dumps(answer()).encode())


def _is_mine(asker: socket.socket) -> bool:
    """Whether the same user asks: the name is not protected by permissions."""
    credentials = asker.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
    return bool(struct.unpack("3i", credentials)[1] == os.getuid())


def answer() -> dict[str, Any]:
    """``{"records": [...], "handles": "ValueError: …"}``: what torch has recorded, null without a recorder;
    the exception that the main thread is handling, or null.
    """
    found = flight.entries()
    if found is None:
        return {"records": None, "handles": _handled()}
    ranks = flight.group_ranks()
    records = [flight.as_record(entry, ranks) for entry in found if not entry.get("is_p2p")]
    return {"records": records, "handles": _handled()}


def _handled() -> str | None:
    """The exception in whose ``except`` or ``finally`` the main thread is, with the user's line."""
    found: Any = sys._current_exceptions().get(threading.main_thread().ident or 0)
    error = found[1] if isinstance(found, tuple) else found  # a tuple until Python 3.11
    if not isinstance(error, BaseException):
        return None
    text = type(error).__name__
    with contextlib.suppress(Exception):  # the user's own __str__
        text = ": ".join(filter(None, [text, (str(error).strip().splitlines() or [""])[0][:TEXT]]))
    where = stacks.error_location(error.__traceback__)
    return f"{text} ({where})" if where else text


def keep() -> None:
    """Leaves what torch has recorded in the rank's folder, for a rank that will be gone when it is asked."""
    if _folder is None or _listener is None or _listener[0] != os.getpid():
        return
    with contextlib.suppress(Exception):  # a full disk: the rank's own error matters more
        Path(_folder, LAST).write_text(json.dumps(answer()["records"]), encoding="utf-8")
