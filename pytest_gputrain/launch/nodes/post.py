"""This process's side of its courier: words to and from the other nodes, and who has been heard of when."""

from __future__ import annotations

import atexit
import contextlib
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections import deque
from pathlib import Path
from typing import IO, Any

from ...values import parse_seconds
from .. import wire
from ..errors import LaunchUsageError
from .where import Where

LOST_AFTER = 8.0
"""Seconds without a heartbeat after which a node counts as gone; ``GPUTRAIN_NODE_TIMEOUT`` sets others."""
_LOST_AFTER = "GPUTRAIN_NODE_TIMEOUT"
_BOOTSTRAP = (
    "import sys; sys.path[:] = [p for p in sys.path if p]; sys.path.append({root!r}); "
    "from pytest_gputrain.launch.nodes.courier import main; sys.path.remove({root!r}); main({fd})"
)


class Post:
    """A courier and what it brought. Stays for later launches between the same nodes."""

    def __init__(self, where: Where, within: float) -> None:
        self.where, self.launches = where, 0
        self.number: int | None = None
        self.address = where.host
        self.words: deque[tuple[int, dict[str, Any]]] = deque()
        self.beats: dict[int, tuple[float, dict[str, Any]]] = {}
        """By node: when it was last heard of (monotonic), and what its heartbeat said."""
        self.failed, self.misused = "", False
        self.lost_after = _lost_after()
        self._joined_at = time.monotonic()
        self._pid = os.getpid()
        self._stderr: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115 - closed in close()
        self._sock, theirs = socket.socketpair()
        with theirs:
            root = str(Path(__file__).resolve().parents[3])
            self._process = subprocess.Popen(
                [sys.executable, "-c", _BOOTSTRAP.format(root=root, fd=theirs.fileno())],
                pass_fds=(theirs.fileno(),), stdin=subprocess.DEVNULL, stdout=self._stderr,
                stderr=self._stderr, start_new_session=True,
            )  # fmt: skip
        self._reader = wire.Reader(self._sock)
        wire.send(self._sock, {"owner": os.getpid(), "nnodes": where.nnodes, "node_rank": where.node_rank,
                               "host": where.host, "port": where.port, "within": within})  # fmt: skip

    @property
    def leads(self) -> bool:
        """Whether this is node 0."""
        return self.number == 0

    @property
    def others(self) -> list[int]:
        """The nodes that this one hears of: all others for node 0, node 0 for them."""
        return list(range(1, self.where.nnodes)) if self.leads else [0]

    def pump(self, timeout: float = 0.0) -> None:
        """Takes what has come, waiting at most ``timeout`` seconds for the first of it."""
        if self.failed:
            return
        self._sock.settimeout(timeout or 0.0)
        while not self.failed:
            try:
                if not self._reader.read():
                    self.failed = f"the courier between the nodes ended: {self.last_words()}"
                    break
            except TimeoutError:
                pass
            frames = list(self._reader.frames())
            for header, _ in frames:
                self._take(header)
            if not frames:
                break
            self._sock.settimeout(0.0)
        self._sock.settimeout(None)

    def _take(self, header: dict[str, Any]) -> None:
        event = header["event"]
        if event == "joined":
            self.number, self.address, self._joined_at = header["number"], header["address"], time.monotonic()
        elif event == "failed":
            self.failed, self.misused = header["why"], header["usage"]
        elif event == "beats":
            now = time.monotonic()
            self.beats |= {int(node): (now - age, data) for node, (age, data) in header["beats"].items()}
        elif event == "said":
            self.words.append((header["node"], header["word"]))

    def say(self, word: dict[str, Any]) -> None:
        """To node 0, or from node 0 to all. Lost where the courier is gone, which ``silent`` then tells."""
        with contextlib.suppress(OSError):
            wire.send(self._sock, {"op": "say", "word": word})

    def beat(self, data: dict[str, Any]) -> None:
        """What the next heartbeats say of this node."""
        with contextlib.suppress(OSError):
            wire.send(self._sock, {"op": "beat", "data": data})

    def silence(self, node: int) -> float:
        """Seconds since a node was last heard of."""
        at, _ = self.beats.get(node, (self._joined_at, {}))
        return time.monotonic() - at

    def no_answer(self, waited: float) -> str:
        """What to say where the courier has come to nothing and does not know why."""
        return (
            f"nothing at {self.where.endpoint} answered as node 0 does within {waited:.0f} s; is it another "
            "program's port?"
        )

    def last_words(self) -> str:
        """The last line of what the courier wrote to standard error."""
        self._stderr.seek(0)
        lines = self._stderr.read()[-4000:].decode(errors="replace").strip().splitlines()
        return lines[-1] if lines else "no output"

    def close(self) -> None:
        """Ends the courier."""
        if self._pid != os.getpid():
            return
        self.failed = self.failed or "the talk between the nodes is over"
        self._sock.close()
        try:
            self._process.wait(5.0)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._stderr.close()


_posts: dict[Where, Post] = {}


def _lost_after() -> float:
    """Raises LaunchUsageError where the variable holds no number of seconds above 0."""
    if not (text := os.environ.get(_LOST_AFTER, "")):
        return LOST_AFTER
    try:
        return parse_seconds(text)
    except ValueError:
        raise LaunchUsageError(f"{_LOST_AFTER}={text!r}: must be seconds above 0, such as 30") from None


def borrow(where: Where, within: float) -> Post:
    """The courier to these nodes: one that is there, or a new one, with ``within`` seconds to find node 0."""
    found = _posts.get(where)
    if found is not None and not found.failed and found._pid == os.getpid():
        return found
    _posts[where] = post = Post(where, within)
    return post


def discard(post: Post) -> None:
    """Ends a courier that no later launch can use."""
    _posts.pop(post.where, None)
    post.close()


def shutdown() -> None:
    """Ends every courier of this process."""
    for post in list(_posts.values()):
        discard(post)


atexit.register(shutdown)
