"""What each rank has entered and where it is: asked of the ranks that can answer, read of the others.

A rank answers by ``recorder.py``, a finished one too as long as its process is there. Of one that cannot
(killed, stopped, or in code that never lets go of the interpreter) the ring of ``calls.py`` is read.
"""

from __future__ import annotations

import contextlib
import json
import linecache
import os
import re
import selectors
import socket
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from . import calls, recorder
from .deadlock import BACKWARD, Scene, from_json
from .member import Member

ANSWER_WITHIN = 1.0
"""Seconds for all answers together; a rank answers within milliseconds unless the machine is overloaded."""
RECORDS = "collectives.json"
_ASKS_FOR_A_RESULT = re.compile(
    r"\.(wait\((\)|timeout|datetime|timedelta)|(result|synchronize|item|cpu|tolist)\()"
)
"""The user's line, with no Python frame above it, on which a rank waits for an asynchronous collective.

A store's ``wait(keys)`` is none: who sets the keys is unknown, and it may end by its timeout.
"""
_ANY_MESSAGE = "isend or irecv"
Records = list[dict[str, Any]]
Answer = dict[str, Any]


def ask(ranks: Sequence[int], mark: str) -> dict[int, Answer]:
    """What ``recorder.answer`` gives, of the ranks that answered."""
    found: dict[int, Answer] = {}
    parts: dict[int, bytearray] = {}
    limit = time.monotonic() + ANSWER_WITHIN
    with selectors.DefaultSelector() as selector:
        for rank in ranks:
            if (sock := _connected(recorder.address(mark, rank))) is not None:
                parts[rank] = bytearray()
                selector.register(sock, selectors.EVENT_READ, rank)
        while selector.get_map() and (left := limit - time.monotonic()) > 0:
            for key, _ in selector.select(left):
                if data := _received(key.fileobj):
                    parts[key.data] += data
                    continue
                selector.unregister(key.fileobj)
                key.fileobj.close()  # type: ignore[union-attr]
                with contextlib.suppress(ValueError):  # it was ended in the middle of a word
                    found[key.data] = json.loads(parts[key.data])
        for key in list(selector.get_map().values()):
            key.fileobj.close()  # type: ignore[union-attr]
    return found


def _connected(address: str) -> socket.socket | None:
    sock = socket.socket(socket.AF_UNIX)
    sock.setblocking(False)
    try:
        sock.connect(address)
    except OSError:  # no such rank, no group yet, or more askers than it can hold
        sock.close()
        return None
    return sock


def _received(sock: Any) -> bytes:
    try:
        data: bytes = sock.recv(1 << 20)
    except OSError:
        return b""
    return data


def read_ring(path: Path) -> Records:
    """The calls that a rank left in its ring, oldest first, in the form of ``recorder.py``."""
    try:
        data = path.read_bytes()
    except OSError:
        return []
    first = calls.FIRST.unpack_from(data)[0] if data else 0
    groups = _json(data[calls.FIRST.size : calls.GROUPS].split(b"\n", 1)[0].strip(b"\0")) or {}
    slots = (data[start : start + calls.SLOT] for start in range(calls.GROUPS, len(data), calls.SLOT))
    found = [record for slot in slots if slot[:1] == b"{" and (record := _json(slot.rstrip()))]
    found = [record for record in found if record["n"] >= first]
    found.sort(key=lambda record: record.pop("n"))
    for record in found:
        record.setdefault("ranks", groups.get(record["group"], []))
        record |= {"state": "done", "note": None}
    return found


def _json(text: bytes) -> Any:
    try:
        return json.loads(text)
    except ValueError:  # the rank was killed while it wrote
        return None


def records_of(answer: Records | None, ring: Records, *, waits: bool) -> tuple[Records, bool]:
    """(the records of a rank, whether they hold every collective): its answer, with messages from the ring.

    ``waits``: whether its main thread waits in a collective, which the ring cannot know of its last call.
    """
    # An empty answer beside calls that were seen: the recorder is off, or knows not this backend.
    if answer or (answer is not None and all(record["seq"] is None for record in ring)):
        return sorted([*answer, *(r for r in ring if r["seq"] is None)], key=lambda r: r["at"] or 0), True
    if waits and ring:
        ring[-1]["state"] = "waiting"
    return ring, False


def scenes(members: Sequence[Member], folder: Path, mark: str) -> dict[int, Scene]:
    """All ranks at this moment. Where running ranks are is what ``observe.dump`` has found last."""
    told = ask([member.rank for member in members if member.exit is None], mark)
    answers: dict[int, Records | None] = {rank: answer["records"] for rank, answer in told.items()}
    for member in members:
        left = folder / f"rank{member.rank}" / recorder.LAST
        if member.rank not in answers and left.is_file():
            answers[member.rank] = _json(left.read_bytes())
    rings = {member.rank: read_ring(folder / f"rank{member.rank}" / calls.FILE) for member in members}
    name_as_called(answers, rings)
    found = {}
    for member in members:
        ring = rings[member.rank]
        source = source_of(member.location)
        asks = member.at_own_line and _ASKS_FOR_A_RESULT.search(source) is not None
        waits = member.in_collective or asks or (member.exit is not None and member.report is None)
        member.records, complete = records_of(answers.get(member.rank), ring, waits=waits)
        seen = found[member.rank] = Scene(
            member.rank,
            _state(member),
            waits and not member.settled,
            member.location,
            source,
            member.waits_in,
            from_json(member.records),
            complete,
        )
        seen.all_messages = len(ring) < calls.SLOTS
        seen.handles = told.get(member.rank, {}).get("handles")
        if member.in_backward and complete and not seen.pending():
            # The engine waits for nobody: it works itself, or is stuck in what it calls.
            seen.blocked, seen.waits_in, member.in_collective = False, BACKWARD, False
        if asks and not seen.pending():
            seen.peers = _peers(member.rank, ring)
            seen.blocked = seen.blocked and bool(seen.peers)  # else nothing asynchronous is under way
            seen.waits_in = (
                ring[-1]["op"] if len(seen.peers) == 1 and ring[-1]["seq"] is None else _ANY_MESSAGE
            )
    return found


def name_as_called(answers: Mapping[int, Records | None], rings: Mapping[int, Records]) -> None:
    """Gives torch's records the operation and the root of the call, which the rings know.

    torch records what a backend does: gloo's reduce_scatter is an all_reduce. A call is renamed on every rank
    that has it or on none, so that ranks of which one ring has been overwritten are not told apart by it.
    """
    called = {
        rank: {(record["group"], record["seq"]): record for record in rings[rank]}
        for rank, answer in answers.items()
        if answer
    }
    known = Counter(key for mine in called.values() for key in mine)
    held = Counter(
        key for rank in called for key in {(record["group"], record["seq"]) for record in answers[rank] or ()}
    )
    for rank, mine in called.items():
        for record in answers[rank] or ():
            key = record["group"], record["seq"]
            if key in mine and known[key] >= held[key]:
                record |= {name: mine[key][name] for name in ("op", "root") if name in mine[key]}


def _peers(rank: int, ring: Records) -> tuple[int, ...]:
    """All ranks to or from which a rank has sent: of several handles any may be the one it waits for."""
    return tuple(sorted({r for record in ring if record["seq"] is None for r in record["ranks"]} - {rank}))


def _state(member: Member) -> Any:
    if member.report is not None:
        return "raised" if member.report["state"] == "failed" else "returned"
    return "running" if member.exit is None else "gone"


def source_of(location: str | None) -> str:
    """The text of the line at ``file:line in function``."""
    file, _, line = (location or "").partition(" in ")[0].rpartition(":")
    if not line.isdigit():
        return ""
    return linecache.getline(os.path.abspath(file), int(line)).strip()


def keep(members: Sequence[Member], folder: Path, *, passed: bool) -> None:
    """Leaves the records of a launch that ended badly among its artifacts."""
    for member in members:
        if member.records and not passed:
            write(folder / f"rank{member.rank}" / RECORDS, member.records)


def clear(members: Sequence[Member], folder: Path) -> None:
    """Removes what ranks wrote for those alone who looked at them."""
    for member in members:
        for name in (calls.FILE, recorder.LAST):
            with contextlib.suppress(OSError):
                (folder / f"rank{member.rank}" / name).unlink()


def write(path: Path, records: Sequence[Mapping[str, Any]]) -> None:
    """A JSON list, a record a line."""
    with contextlib.suppress(OSError):  # a full disk must not hide the verdict
        path.write_text("[\n" + ",\n".join(json.dumps(record) for record in records) + "\n]\n")
