"""Looks at running ranks from outside: how much CPU they use, how much they print, where they are."""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from . import output, process, stacks
from .member import Member
from .place import DUMP_SIGNAL

LOOKS = 5
"""Looks at a slow rank: enough to tell the line that costs from one that was met by chance."""


def sample(members: Sequence[Member], folder: Path, now: float) -> None:
    """Notes the CPU time and the output of each rank, and keeps the output files small."""
    used = process.cpu_seconds([member.pid for member in members if member.pid])
    for member in members:
        size = 0
        for name in ("stdout.log", "stderr.log"):
            path = folder / f"rank{member.rank}" / name
            with suppress(OSError):
                size += path.stat().st_size
            output.relieve(path)
        member.observe(now, used.get(member.pid or 0, 0.0), size)


def dump(members: Sequence[Member], folder: Path) -> None:
    """Asks ranks for their stacks (faulthandler answers even while C code runs) and reads where they are.

    A rank that cannot answer within a second, because it is stopped or has replaced itself by another
    program, keeps what is known of it.
    """
    asked = [(member, path) for member in members if (path := _ask(member, folder)) is not None]
    limit = time.monotonic() + 1.0
    while time.monotonic() < limit and any(not _answer(path) for _, path in asked):
        time.sleep(0.01)
    time.sleep(0.02)  # faulthandler writes in pieces
    for member, path in asked:
        text = _answer(path)
        if not text and process.is_stopped(member.pid or 0):
            member.stacks = "stopped by a signal (SIGSTOP or a debugger), so it cannot say where it is"
            continue
        member.stacks = stacks.last_dump(text)
        frames = stacks.main_thread(text)
        frame = stacks.user_frame(frames)
        member.waiting_at = str(frame) if frame else None
        member.waits_in = stacks.waits_in(frames)
        member.in_backward = stacks.in_backward(frames)
        member.at_own_line = frame is not None and frame == frames[0]
        # A side thread (an asynchronous checkpoint) may yet send what the main thread waits for.
        member.in_collective = stacks.in_collective(frames) and not stacks.side_thread_works(text)


def most_time(members: Sequence[Member], folder: Path) -> str:
    """Where busy ranks spend their time, by several looks at their stacks, of which the first was taken.

    ``waiting_at`` of each becomes the line that was seen most often. Takes about half a second.
    """
    seen: dict[int, Counter[str]] = {member.rank: Counter() for member in members}
    limit = time.monotonic() + 3.0
    for look in range(LOOKS):
        if look and time.monotonic() < limit:
            time.sleep(0.5 / LOOKS)
            dump(members, folder)
        for member in members:
            if member.waiting_at and not member.in_collective:
                seen[member.rank][member.waiting_at] += 1
    lines = []
    for member in members:
        for location, times in seen[member.rank].most_common(1):
            member.waiting_at = location
            lines.append(f"rank {member.rank} in {times} of {seen[member.rank].total()} looks at {location}")
    return f"slow, not hung: {'; '.join(lines[:4])}; more time is timeout=SECONDS" if lines else ""


def _ask(member: Member, folder: Path) -> Path | None:
    path = folder / f"rank{member.rank}" / "stacks.txt"
    if member.pid is None or not path.exists():
        return None
    # Its file is there an instant before its handler, and a rank that has replaced itself by another program
    # has none: the signal would kill it.
    ready = process.catches(member.pid, DUMP_SIGNAL)
    with path.open("a") as file:
        file.write(f"{stacks.DUMP_MARK}{time.strftime('%H:%M:%S')}\n")
    if ready:
        with suppress(OSError):
            os.kill(member.pid, DUMP_SIGNAL)
    return path


def _answer(path: Path) -> str:
    """What came after the last question."""
    text = path.read_text(errors="replace")
    return text[text.rindex(stacks.DUMP_MARK) :].partition("\n")[2]
