"""The fork server: one quiet process with torch imported, from which ranks are forked.

It serves one launch at a time, so that whatever descends from it belongs to that launch: as a subreaper it
adopts every orphan, also of ranks' children that made sessions of their own. When its owner's end of the
control socket closes, because the owner ended it or was SIGKILLed, it kills all that is below it and ends.

Single-threaded, and it must stay so: only then is fork safe.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import os
import selectors
import shutil
import signal
import socket
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from . import output, pages, place, process, rank, recorder, warm_rank, wire

_ORPHAN_CHECK = 1.0  # seconds between looks at the parent, for owners whose socket a forked child keeps open


_LAST_BREATH = 5.0  # seconds that a dying owner, whose sockets are closed already, may take to be gone


class Server:
    """Serves requests of its owner until the owner is gone."""

    def __init__(self, control: socket.socket, owner: int) -> None:
        self._control = control
        self._owner = owner
        self._reader = wire.Reader(control)
        self._temporary: str | None = None
        self._temporary_places: set[Path] = set()
        self._dismissed = False
        self._spare_time: Iterator[None] | None = None

    def serve(self) -> None:
        """The loop; returns when the owner has closed its side, with nothing left below this process."""
        process.adopt_orphans()
        wake_read, wake_write = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.set_wakeup_fd(wake_write, warn_on_full_buffer=False)
        gc.collect()
        gc.freeze()  # a collection in a rank would otherwise touch, and so copy, every page of torch
        wire.send(self._control, {"event": "ready"})
        with selectors.DefaultSelector() as selector:
            selector.register(self._control, selectors.EVENT_READ)
            selector.register(wake_read, selectors.EVENT_READ)
            self._spare_time = pages.collapse()
            while os.getppid() == self._owner:
                ready = selector.select(0 if self._spare_time else _ORPHAN_CHECK)
                if not ready and self._spare_time and next(self._spare_time, self) is self:
                    self._spare_time = None
                for key, _ in ready:
                    if key.fileobj is self._control:
                        if not self._reader.read(max_fds=512):
                            return self._clean_up()
                        self._answer_all()
                    else:
                        with contextlib.suppress(BlockingIOError):
                            os.read(wake_read, 4096)
                self._tell_exits(process.reap())
        self._clean_up()

    def _answer_all(self) -> None:
        for header, body in self._reader.frames():
            if header["op"] == "launch":
                fds, self._reader.fds = self._reader.fds, []
                self._launch(header, body, fds)
            elif header["op"] == "terminate":
                for child in process.descendants():
                    with contextlib.suppress(Exception):
                        child.terminate()
            elif header["op"] == "end":
                self._end()
            elif header["op"] == "temporary":
                self._temporary = header["folder"]
            elif header["op"] == "dismiss":
                self._dismissed = True
            elif header["op"] == "preload":
                _import(header["names"])
                gc.freeze()
                self._spare_time = pages.collapse()

    def _launch(self, spec: dict[str, Any], call: bytes, fds: list[int]) -> None:
        self._temporary = spec["folder"] if spec["temporary"] else None
        if self._temporary is not None:
            self._temporary_places.add(Path(self._temporary).parent)
        pids = []
        listener = _listener() if spec["kind"] == "function" else None
        try:
            if listener is not None:
                spec["environ"]["MASTER_PORT"] = str(listener.getsockname()[1])
            members = range(spec["world_size"] if listener is not None else spec["agents"])
            for number in members:
                pid = os.fork()
                if pid == 0:
                    self._child(spec, number, call, fds, listener)
                pids.append(pid)
        finally:
            if listener is not None:
                listener.close()
            for fd in fds:
                os.close(fd)
        wire.send(self._control, {"event": "started", "pids": pids, "at": time.monotonic()})

    def _child(
        self, spec: dict[str, Any], number: int, call: bytes, fds: list[int], listener: socket.socket | None
    ) -> None:
        """In the forked child; never returns into the server's loop."""
        try:
            parent = os.getppid()
            self._control.close()
            if listener is not None:
                self._function_rank(spec, number, call, fds, listener, parent)
            else:
                from . import agent

                agent.run(spec, number, fds, parent)
        except BaseException:  # whatever it is must not reach the server's loop
            sys.excepthook(*sys.exc_info())
        finally:
            os._exit(70)

    def _function_rank(
        self,
        spec: dict[str, Any],
        number: int,
        call: bytes,
        fds: list[int],
        listener: socket.socket,
        parent: int,
    ) -> None:
        for other, fd in enumerate(fds):
            if other != number:
                os.close(fd)
        link = rank.Link(fds[number], number)
        own = {"RANK": str(number), "LOCAL_RANK": str(number)}
        environ = {**spec["environ"], **own}
        streams = place.take_place(parent, Path(spec["folder"]), number, environ, spec["cwd"])
        sys.path[:] = spec["sys_path"]
        sys.argv[:] = spec["argv"]
        listen_fd = None
        if number == 0:
            listen_fd = listener.detach()
        else:
            listener.close()
        if spec["isolation"] == "warm":
            warm_rank.run(link, spec, number, call, listen_fd, streams)
        rank.run_function(link, spec, number, call, listen_fd)

    def _tell_exits(self, ended: list[tuple[int, int]]) -> None:
        for pid, status in ended:
            code, name = process.exit_of(status)
            event = {"event": "exit", "pid": pid, "exit_code": code, "signal": name, "at": time.monotonic()}
            with contextlib.suppress(OSError):
                wire.send(self._control, event)

    def _end(self) -> None:
        """Ends the launch: everything below this process, the owner told what had to be killed."""
        ended = process.reap()
        left = process.descendants() if process.has_children() else []
        leftovers = [process.describe(child) for child in left]
        clean = process.kill_descendants(ended)
        self._tell_exits(ended)
        self._temporary = None
        wire.send(self._control, {"event": "ended", "leftovers": leftovers, "clean": clean})

    def _clean_up(self) -> None:
        process.kill_descendants([])
        if self._temporary is not None:
            shutil.rmtree(self._temporary, ignore_errors=True)
        if not self._dismissed and self._owner_is_gone():
            for parent in self._temporary_places:
                for folder in parent.glob(f"{output.TEMPORARY}{self._owner}-*"):
                    shutil.rmtree(folder, ignore_errors=True)

    def _owner_is_gone(self) -> bool:
        """Whether the owner has died, by a signal perhaps: it cannot remove what its results kept."""
        limit = time.monotonic() + _LAST_BREATH
        while os.getppid() == self._owner and time.monotonic() < limit:
            time.sleep(0.01)
        return os.getppid() != self._owner


def _listener() -> socket.socket:
    """A listening loopback socket whose port the kernel chose; rank 0 inherits it, so no port is guessed."""
    listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    listener.bind(("127.0.0.1", 0))
    listener.listen(512)
    return listener


def _import(names: list[str]) -> None:
    for name in names:
        with contextlib.suppress(Exception):  # a rank that needs it will say what is wrong with it
            importlib.import_module(name)


def main(fd: int, owner: int, preload: list[str]) -> None:
    """Entry point of the server process; ``fd`` is the control socket."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the owner's to handle
    _import(preload)
    assert output and rank and warm_rank  # what ranks need is loaded now, once
    with contextlib.suppress(Exception):  # torch's private parts may have moved: ranks then go unrecorded
        recorder.prepare()
    Server(socket.socket(fileno=fd), owner).serve()
    os._exit(0)  # tearing torch down takes longer than the owner should wait
