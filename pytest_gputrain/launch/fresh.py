"""Launches by new ranks, which end with the launch."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any

from . import client, scene, sweep
from .client import ServerHandle
from .conclude import concluded
from .errors import ServerLost
from .folder import Folder
from .member import Member
from .nodes import post, where
from .nodes.arriving import NodeAbsent
from .nodes.meet import meet
from .nodes.meeting import Meeting
from .records import Cause, RankResult, Verdict
from .result import LaunchResult
from .supervise import Supervision


def watched(
    spec: dict[str, Any], call: bytes, size: int, folder: Folder, cancelled: Callable[[], bool] | None
) -> LaunchResult:
    """The launch by new ranks. Whatever happens, what it started is ended when this returns or raises."""
    began = time.monotonic()
    members, path, mark = [Member(rank) for rank in range(size)], folder.path(), sweep.mark(spec)
    spec |= {"folder": str(path), "temporary": folder.temporary}
    if spec["kind"] == "script":
        spec["torchrun"].append(f"--log-dir={path / 'torchrun'}")
    # By the caller's environment: one server for launches of one rank and of many, whose threads differ.
    starting = spec.pop("start_environ")
    try:
        server, meeting = _met(spec, starting)
    except NodeAbsent as error:
        return _never_started(str(error), size, folder, time.monotonic() - began)
    supervision = Supervision(server, members, spec, path, meeting=meeting)
    in_order = False
    try:
        supervision.start(call)
        ending = supervision.watch(cancelled)
        seconds = time.monotonic() - supervision.began
        supervision.end(ending)
        in_order = True
    except ServerLost as error:
        lost = Cause(None, "server", str(error))
        ranks = [member.result(path, supervision.began, ended_after=math.inf) for member in members]
        return LaunchResult(Verdict.CRASHED, lost, ranks, folder, time.monotonic() - supervision.began)
    finally:
        supervision.close()
        if in_order:
            server.preload((members[0].report or {}).get("imported", []))
            client.give_back(server)
        else:  # KeyboardInterrupt, a timeout's exception, a cancelled launch, a dead server
            server.close()
            sweep.kill_marked(mark)
            if meeting is not None:
                post.discard(meeting.post)  # the others see that this node is gone
    result = concluded(supervision, spec["kind"], ending, seconds, path, folder)
    scene.clear(members, path)
    return result


def _met(spec: dict[str, Any], starting: dict[str, str]) -> tuple[ServerHandle, Meeting | None]:
    """The fork server, and the meeting with other nodes where there are any. Raises NodeAbsent."""
    if not spec.get("where"):
        return client.borrow(starting), None
    courier = post.borrow(where.Where(**spec["where"]), spec["timeout"])  # starts while the server does
    server = client.borrow(starting)
    try:
        return server, meet(spec, courier)
    except BaseException:
        client.give_back(server)
        raise


def _never_started(why: str, size: int, folder: Folder, seconds: float) -> LaunchResult:
    """A launch that waited in vain for another node."""
    ranks = [RankResult(rank, "ended", fate="never started") for rank in range(size)]
    return LaunchResult(Verdict.HUNG, Cause(None, "node", why), ranks, folder, seconds)
