"""What has to be the same on all machines of a launch, and in one line what is not. Pure."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

PROTOCOL = 1
"""Of the words between nodes; one that says another number is not understood."""
_SAME = ("nnodes", "nproc", "script", "sha256", "version")


def what(nnodes: int, nproc: int, script: str, module: bool) -> dict[str, Any]:
    """What a machine says of how it was started; a module's text may differ, as installations do."""
    text = b"" if module else Path(script).read_bytes()
    return {
        "nnodes": nnodes,
        "nproc": nproc,
        "script": script if module else Path(script).name,
        "sha256": hashlib.sha256(text).hexdigest(),
        "version": PROTOCOL,
    }


def differs(mine: Mapping[str, Any], node: int, theirs: Mapping[str, Any]) -> str | None:
    """In one line, what two nodes were not started alike with; each has its ``host`` too."""
    for name in _SAME:
        if mine[name] != theirs.get(name):
            here, there = f"node 0 ({mine['host']})", f"node {node} ({theirs['host']})"
            if name == "sha256":
                return f"{mine['script']} is another text on {here} than on {there}; copy it to every machine"
            called = "pytest-gputrain's protocol" if name == "version" else name
            values = f"{called} is {mine[name]} on {here} and {theirs.get(name)} on {there}"
            return f"{values}; start the same command on every machine"
    return None


def never_arrived(missing: list[int], nnodes: int, endpoint: str, waited: float, here: str = "") -> str:
    """In one line, which nodes did not come and what to do; ``here`` names those that did."""
    names = f"node {missing[0]}" if len(missing) == 1 else f"nodes {', '.join(map(str, missing))}"
    came = f", {here} came" if here else ""
    return (
        f"{names} never arrived: waited {waited:.0f} s at {endpoint} for {nnodes} nodes{came}; start the "
        f"same command there with --node-rank {missing[0]}, or look for a firewall between the machines"
    )
