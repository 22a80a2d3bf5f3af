"""Frames on a Unix socket: a JSON header, an opaque body, and sometimes file descriptors.

Used between the pytest process, the fork server and the ranks. Only the body of a rank's report is a
pickle, and it never touches the disk.
"""

from __future__ import annotations

import json
import socket
import struct
from collections.abc import Iterator, Sequence
from typing import Any

_LENGTHS = struct.Struct("!IQ")
CHUNK = 1 << 20
"""Bytes that are sent, and at most received, in one go."""

Header = dict[str, Any]
Frame = tuple[Header, bytes]


def send(sock: socket.socket, header: Header, body: bytes = b"", fds: Sequence[int] = ()) -> None:
    """Sends one frame and blocks until it is in the kernel. Raises OSError when the other side is gone."""
    head = json.dumps(header).encode()
    first = _LENGTHS.pack(len(head), len(body)) + head
    if len(body) <= CHUNK:  # in one piece: each wakes the other side
        first, body = first + body, b""
    if fds:
        sent = socket.send_fds(sock, [first], list(fds))
        first = first[sent:]
    sock.sendall(first)
    if body:
        sock.sendall(body)


class Reader:
    """Collects frames from a socket that may deliver them in any pieces."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self.fds: list[int] = []
        self.received = 0
        self._buffer = bytearray()

    def read(self, max_fds: int = 0) -> bool:
        """Takes what is there (blocks if the socket blocks). False at the end of the stream."""
        try:
            if max_fds:
                data, fds, _, _ = socket.recv_fds(self.sock, CHUNK, max_fds)
                self.fds.extend(fds)
            else:
                data = self.sock.recv(CHUNK)
        except BlockingIOError:
            return True
        except ConnectionError:
            return False
        self._buffer += data
        self.received += len(data)
        return bool(data)

    def frames(self) -> Iterator[Frame]:
        """The complete frames received so far, each once."""
        while (frame := self._take()) is not None:
            yield frame

    def _take(self) -> Frame | None:
        if len(self._buffer) < _LENGTHS.size:
            return None
        head_size, body_size = _LENGTHS.unpack_from(self._buffer)
        start, end = _LENGTHS.size + head_size, _LENGTHS.size + head_size + body_size
        if len(self._buffer) < end:
            return None
        header: Header = json.loads(self._buffer[_LENGTHS.size : start])
        body = bytes(self._buffer[start:end])
        del self._buffer[:end]
        return header, body
