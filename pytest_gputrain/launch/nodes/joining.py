"""How one node comes to the meeting: node 0 opens the store at the endpoint, the others join it there."""

from __future__ import annotations

import contextlib
import errno
import socket
import time
import uuid
from datetime import timedelta
from typing import Any

PREFIX = "gputrain"
ANSWER_WITHIN = 60.0


class NoMeeting(Exception):
    """This node cannot come to the endpoint; one line."""


class Unreachable(NoMeeting):
    """Node 0 is not there; one line."""


class Joining:
    """``number``: which node this is, counted from 0; -1 until that is known."""

    def __init__(self, config: dict[str, Any]) -> None:
        self._where = config
        self.number = -1

    def joined(self) -> tuple[Any, bool]:
        """The store, and whether this node hosts it. Raises NoMeeting."""
        number = self._where["node_rank"]
        listener = self._bound() if number in (None, 0) else None
        store = self._store(listener)
        if listener is not None:
            self.number = 0
            for node in range(self._where["nnodes"]):
                store.set(f"beat/{node}", b"")
            store.set("open", str(self._where["nnodes"]).encode())
            nnodes = self._where["nnodes"]
        else:
            store.wait(["open"], timedelta(seconds=self._where["within"]))
            nnodes = int(store.get("open"))
            self.number = int(store.add("joined", 1)) if number is None else number
        if self.number >= nnodes:  # of which node 0 would never hear
            raise NoMeeting(
                f"this is node {self.number} counted from 0, and node 0 was started for {nnodes} nodes; "
                "start the same command on every machine, once"
            )
        claim = f"{uuid.uuid4().hex} {socket.gethostname()}"
        taken = store.compare_set(f"claim/{self.number}", "", claim).decode()
        if taken != claim:
            raise NoMeeting(
                f"node {self.number} is {taken.partition(' ')[2]} already; "
                "give each machine a --node-rank of its own"
            )
        return store, listener is not None

    def _bound(self) -> socket.socket | None:
        """A socket that listens at the endpoint; None where it is another machine's."""
        host, port = self._where["host"], self._where["port"]
        required = self._where["node_rank"] == 0
        try:
            family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        except OSError as error:
            raise NoMeeting(f"{host!r} is no known host ({error.strerror or error})") from None
        listener = socket.socket(family, kind)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind(address)
            listener.listen(2048)
            return listener
        except OSError as error:
            listener.close()
            if not required:
                return None
            if error.errno == errno.EADDRNOTAVAIL:
                raise NoMeeting(
                    f"this is node 0, but no interface of {socket.gethostname()} has the address of "
                    f"{host!r}; the endpoint is host:port of node 0"
                ) from None
            raise NoMeeting(
                f"port {port} of {host} cannot be had ({error.strerror}); give another one"
            ) from None

    def _store(self, listener: socket.socket | None) -> Any:
        from torch.distributed import PrefixStore, TCPStore  # type: ignore[attr-defined]

        host, port, within = self._where["host"], self._where["port"], self._where["within"]
        if listener is None:
            self._reachable(host, port, within)
        store = TCPStore(
            host,
            port,
            None,
            is_master=listener is not None,
            timeout=timedelta(seconds=ANSWER_WITHIN),
            wait_for_workers=False,
            master_listen_fd=listener.detach() if listener is not None else None,
        )
        return PrefixStore(PREFIX, store)

    def _reachable(self, host: str, port: int, within: float) -> None:
        """Waits until node 0 listens. A store's own wait prints, and says nothing of why."""
        began, last = time.monotonic(), "no try"
        while (left := within - (time.monotonic() - began)) > 0:
            try:
                socket.create_connection((host, port), timeout=min(left, 5.0)).close()
                return
            except OSError as error:
                last = error.strerror or str(error)
                time.sleep(0.1)
        raise Unreachable(
            f"node 0 did not open {host}:{port} within {within:.0f} s ({last}); start the same command there "
            "with --node-rank 0, or look for a firewall between the machines"
        )

    def address(self) -> str:
        """The address by which this machine reaches the endpoint: what others reach it by."""
        family, kind, _, _, address = socket.getaddrinfo(
            self._where["host"], self._where["port"], type=socket.SOCK_DGRAM
        )[0]
        with contextlib.suppress(OSError), socket.socket(family, kind) as probe:
            probe.connect(address)  # sends nothing
            return str(probe.getsockname()[0])
        return str(self._where["host"])
