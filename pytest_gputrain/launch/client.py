"""The owner's side of fork servers: start one, lend it to one launch at a time, end it.

A server is reused by later launches whose start-up environment is the same; one that was interrupted is
abandoned, and cleans up after itself.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import IO

import psutil

from . import libraries, process, wire
from .errors import ServerLost

START_DEADLINE = 120.0
"""Seconds for a server to import torch: 2 s here, far more from a cold network file system."""
_MOST_IDLE = 2
"""Idle servers kept; each holds torch in memory (about 250 MB, most of it shared with its ranks)."""
_AT_START = (
    "LD_", "DYLD_", "PYTHON", "OMP_", "KMP_", "GOMP_", "MKL_", "OPENBLAS_", "MALLOC_", "GLIBC_", "ASAN_",
    "TORCH", "PYTORCH", "ATEN_", "DNNL_", "ONEDNN_", "CUBLAS_", "CUDNN_", "CUDA_LAUNCH_BLOCKING", "TRITON_",
    "HF_", "HUGGINGFACE_", "TRANSFORMERS_",
)  # fmt: skip
"""Variables that the interpreter or torch's libraries read once, when they are loaded."""
_READ_LATER = ("TORCHELASTIC_", "TORCH_FR_", "TORCH_NCCL_", "TORCH_GLOO_", "TORCH_DISTRIBUTED_DEBUG")

_PRELOAD = (
    "torch",
    "torch.distributed",
    "torch.nn.parallel",
    "torch.optim",
    "torch._dynamo",  # else imported by the first optimizer or DDP step: 1 s a rank
    "torch.distributed.run",
    "torch.utils.serialization.config",  # else by the first torch.save: 10 ms a rank
    "cloudpickle",
)

_BOOTSTRAP = """\
import sys
sys.path[:] = [p for p in sys.path if p]
sys.path.append({root!r})
from pytest_gputrain.launch.server import main
sys.path.remove({root!r})
main({fd}, {owner}, {preload!r})
"""


class ServerHandle:
    """One fork server. Not thread-safe: a launch has it to itself."""

    def __init__(self, environ: Mapping[str, str]) -> None:
        self.key = start_key(environ)
        self.sock, theirs = socket.socketpair()
        self._stderr: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115 - closed in close()
        with theirs:
            self._process = self._start(theirs.fileno(), environ)
        self.reader = wire.Reader(self.sock)
        self._children = process.ProcFile(f"/proc/{self.pid}/task/{self.pid}/children")
        try:
            self._await_ready()
        except BaseException:  # KeyboardInterrupt while torch is being imported
            self.close()
            raise

    def _start(self, fd: int, environ: Mapping[str, str]) -> subprocess.Popen[bytes]:
        root = str(Path(__file__).resolve().parents[2])
        # pytest too, if it is here: rewritten assertions need it, and importing it costs a rank 0.15 s.
        preload = [*_PRELOAD, *(["pytest"] if "pytest" in sys.modules else [])]
        # Models of a library that this process has imported are most likely what its ranks train.
        preload += libraries.with_models()
        code = _BOOTSTRAP.format(root=root, fd=fd, owner=os.getpid(), preload=preload)
        return subprocess.Popen(
            [sys.executable, "-c", code],
            env=dict(environ),
            pass_fds=(fd,),
            stdin=subprocess.DEVNULL,
            stdout=self._stderr,
            stderr=self._stderr,
            start_new_session=True,  # Ctrl-C and a shell's kill of the process group are for the owner
        )

    def _await_ready(self) -> None:
        self.sock.settimeout(START_DEADLINE)
        try:
            while self.reader.read():
                if any(header["event"] == "ready" for header, _ in self.reader.frames()):
                    self.sock.settimeout(None)
                    return
            why = "ended before it was ready"
        except TimeoutError:
            why = f"was not ready after {START_DEADLINE:.0f} s"
        raise ServerLost(f"the process that forks the ranks {why}: {self.last_words()}")

    def last_words(self) -> str:
        """What the server wrote to standard error, its last lines."""
        self._stderr.seek(0)
        lines = self._stderr.read()[-4000:].decode(errors="replace").strip().splitlines()
        return "\n".join(lines[-15:]) or "no output"

    def preload(self, names: list[str]) -> None:
        """Has the server import what the ranks of the last launch had to; it does so while nobody waits."""
        if names:
            with contextlib.suppress(OSError):
                wire.send(self.sock, {"op": "preload", "names": names})

    @property
    def pid(self) -> int:
        """The server's process."""
        return self._process.pid

    @property
    def alive(self) -> bool:
        """Whether the process is there."""
        return self._process.poll() is None

    def end_launch(self, within: float = 30.0) -> bool:
        """Has the server end all that is below it; False if it cannot. Between launches only."""
        self.sock.settimeout(within)
        try:
            wire.send(self.sock, {"op": "end"})
            while self.reader.read():
                if any(header["event"] == "ended" for header, _ in self.reader.frames()):
                    self.sock.settimeout(None)
                    return True
        except OSError:
            return False
        return False

    def strangers(self, own: Collection[int]) -> list[int]:
        """Living processes whose parent the server is, ``own`` aside: what ranks have left to it."""
        pids = list[int]()
        if (listed := self._children.read()) is not None:
            pids = [int(word) for word in listed.split()]
        else:  # a kernel without that list
            with contextlib.suppress(psutil.Error):
                pids = [child.pid for child in psutil.Process(self.pid).children()]
        return [child for child in pids if child not in own and process.is_alive(child)]

    def close(self, within: float = 15.0) -> None:
        """Ends the server and all below it: it cleans up when its socket closes; SIGKILL if it does not."""
        with contextlib.suppress(OSError):
            wire.send(self.sock, {"op": "dismiss"})  # else it takes this process for dead
        self.sock.close()
        self._children.close()
        try:
            self._process.wait(within)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._stderr.close()


def is_read_at_start(name: str) -> bool:
    """Whether a variable of this name counts only for a process that starts."""
    return name.startswith(_AT_START) and not name.startswith(_READ_LATER)


def start_key(environ: Mapping[str, str]) -> tuple[tuple[str, str], ...]:
    """The part of an environment that a process reads only when it starts."""
    return tuple(sorted((name, value) for name, value in environ.items() if is_read_at_start(name)))


_idle: list[ServerHandle] = []
_lock = threading.Lock()
_pid = os.getpid()


def borrow(environ: Mapping[str, str]) -> ServerHandle:
    """An idle server that was started with this environment, or a new one. Raises ServerLost."""
    global _pid
    with _lock:
        if _pid != os.getpid():  # forked: the servers are the parent's
            _idle.clear()
            _pid = os.getpid()
        key = start_key(environ)
        for server in reversed(_idle):
            if server.key == key:
                _idle.remove(server)
                if server.alive:
                    return server
    return ServerHandle(environ)


def give_back(server: ServerHandle) -> None:
    """Returns a server after a launch that ended in order."""
    with _lock:
        _idle.append(server)
        surplus = [_idle.pop(0)] if len(_idle) > _MOST_IDLE else []
    for old in surplus:
        old.close()


def shutdown() -> None:
    """Ends every idle fork server of this process. Called at exit; safe to call at any time."""
    with _lock:
        servers = list(_idle) if _pid == os.getpid() else []
        _idle.clear()
    for server in servers:
        with contextlib.suppress(OSError):
            server.close()


atexit.register(shutdown)
