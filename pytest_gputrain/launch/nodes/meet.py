"""Brings the nodes of a launch together before any rank starts."""

from __future__ import annotations

from typing import Any

from . import post
from .arriving import NodeAbsent, arrive
from .meeting import Meeting


def meet(spec: dict[str, Any], courier: post.Post) -> Meeting:
    """The meeting of a launch's nodes, all there and alike; ``spec`` then says which node this is.

    Waits at most the launch's timeout. Raises LaunchUsageError where nodes differ, NodeAbsent where one
    never came.
    """
    meeting = Meeting(courier, spec["what"])
    try:
        arrive(meeting, spec["timeout"])
    except NodeAbsent:
        post.discard(courier)
        raise
    except ValueError:
        if courier.failed:  # else a later launch, started alike, finds the nodes together
            post.discard(courier)
        raise
    spec["node"] = {
        "number": meeting.number,
        "endpoint": courier.where.endpoint,
        "address": courier.address,
        "run": f"gputrain-{meeting.launch}",
    }
    return meeting
