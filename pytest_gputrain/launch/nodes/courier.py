"""The process that carries words between nodes, over torch's TCPStore at the endpoint; one a machine.

``post.py`` starts it. Node 0's hosts the store, bound to the endpoint's address and no other; torch's own
rendezvous joins the same store under names of its own. Each node writes a log (``log/NODE/K``); node 0 reads
everybody's, the others read node 0's. A node's ``beat/NODE`` says that it is alive and how long its log is.
JSON, compressed, never pickle; sizes are bounded. It ends with whoever started it.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import select
import socket
import sys
import threading
import time
import zlib
from typing import Any

from pytest_gputrain.launch import process, wire
from pytest_gputrain.launch.nodes.joining import Joining, NoMeeting, Unreachable

BEAT_EVERY = 0.05
"""Seconds between two looks at the store, and a millisecond more for each node, so that node 0 keeps up."""
TOLD_EVERY = 0.2
MOST_BYTES = 6 << 20
"""Of one word, compressed: a TCPStore takes 8 MiB."""
MOST_PLAIN = 256 << 20


def packed(word: dict[str, Any]) -> bytes:
    """A word as the store holds it. Raises ValueError for one that is too large."""
    data = zlib.compress(json.dumps(word).encode(), 3)
    if len(data) > MOST_BYTES:
        raise ValueError(f"{len(data):,} bytes are more than {MOST_BYTES:,}")
    return data


def unpacked(data: bytes) -> dict[str, Any]:
    """The word in ``data``. Raises ValueError for anything else."""
    engine = zlib.decompressobj()
    try:
        plain = engine.decompress(data, MOST_PLAIN)
    except zlib.error as error:
        raise ValueError(str(error)) from None
    word = json.loads(plain)
    if not isinstance(word, dict):
        raise ValueError("no object")
    return word


class Courier:
    """One node's courier. A thread talks to the store: on a network that is cut it blocks without end."""

    def __init__(self, owner: socket.socket, config: dict[str, Any]) -> None:
        self._owner, self._reader = owner, wire.Reader(owner)
        self._lock = threading.Lock()
        self._where: dict[str, Any] = config
        self._out: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
        self._data: dict[str, Any] = {}
        self._seen: dict[int, tuple[float, int, dict[str, Any]]] = {}
        self.number = -1

    def run(self) -> None:
        """Until the owner is gone."""
        threading.Thread(target=self._carry, daemon=True).start()
        told = 0.0
        while True:
            ready, _, _ = select.select([self._owner], [], [], TOLD_EVERY)
            if ready and not self._reader.read():
                return
            for header, _body in self._reader.frames():
                if header["op"] == "beat":
                    self._data = header["data"]
                else:
                    self._out.put(header["word"])
            if time.monotonic() - told >= TOLD_EVERY:
                told = time.monotonic()
                self._tell_beats(told)

    def _tell_beats(self, now: float) -> None:
        seen = {str(node): [now - at, data] for node, (at, _, data) in list(self._seen.items())}
        # Not to an owner that is busy with something else: what it has not read would block this.
        if self.number >= 0 and select.select([], [self._owner], [], 0)[1]:
            self._tell({"event": "beats", "beats": seen})

    def _tell(self, header: dict[str, Any]) -> None:
        with self._lock, contextlib.suppress(OSError):
            wire.send(self._owner, header)

    def _carry(self) -> None:
        try:
            joining = Joining(self._where)
            store, host = joining.joined()
            self.number = joining.number
            self._tell(
                {"event": "joined", "number": self.number, "address": joining.address(), "hosts": host}
            )
            self._talk(store)
        except NoMeeting as error:
            self._tell({"event": "failed", "why": str(error), "usage": not isinstance(error, Unreachable)})
        except Exception as error:  # what torch raises when the other side has gone away
            self._tell(
                {"event": "failed", "usage": False, "why": f"{type(error).__name__}: {_first_line(error)}"}
            )

    def _talk(self, store: Any) -> None:
        others = [0] if self.number else list(range(1, self._where["nnodes"]))
        said, counter = 0, 0
        heard = dict.fromkeys(others, 0)
        every = BEAT_EVERY + 0.001 * self._where["nnodes"]
        while True:
            while not self._out.empty():
                store.set(f"log/{self.number}/{said}", packed(self._out.get()))
                said += 1
            counter += 1
            beat = {"n": counter, "said": said, "data": self._data}
            store.set(f"beat/{self.number}", json.dumps(beat).encode())
            for node, text in zip(others, store.multi_get([f"beat/{node}" for node in others]), strict=True):
                if text:
                    self._hear(store, node, json.loads(text), heard)
            time.sleep(every)

    def _hear(self, store: Any, node: int, beat: dict[str, Any], heard: dict[int, int]) -> None:
        _, last, _ = self._seen.get(node, (0.0, 0, {}))
        if beat["n"] != last:
            self._seen[node] = (time.monotonic(), beat["n"], beat["data"])
        while heard[node] < beat["said"]:
            key = f"log/{node}/{heard[node]}"
            self._tell({"event": "said", "node": node, "word": unpacked(store.get(key))})
            heard[node] += 1
            if self.number == 0:
                store.delete_key(key)


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [""])[0][:200]


def main(fd: int) -> None:
    """Entry point; the first frame on ``fd`` says where to go."""
    owner = socket.socket(fileno=fd)
    reader = wire.Reader(owner)
    while True:
        if not reader.read():
            return
        if (frame := next(reader.frames(), None)) is not None:
            break
    process.die_with_parent(frame[0]["owner"])
    courier = Courier(owner, frame[0])
    courier._reader = reader
    courier.run()
    os._exit(0)  # its thread may be waiting for a network that is gone


if __name__ == "__main__":
    main(int(sys.argv[1]))
