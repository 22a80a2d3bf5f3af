"""From a launch of which nothing runs any more to its result."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..trace import stackdumps
from . import blame, output, scene
from .folder import Folder
from .nodes import conclude as of_nodes
from .nodes import seen
from .records import Cause, Verdict
from .result import LaunchResult
from .supervise import Supervision
from .verdict import Ending, judge


def concluded(
    supervision: Supervision, kind: str, ending: Ending, seconds: float, folder: Path, artifacts: Folder
) -> LaunchResult:
    """The ranks, the verdict and its cause, and what is likely behind it.

    ``folder`` is where the ranks have written; ``artifacts`` where it is to be found.
    """
    members = supervision.members
    ranks = seen.results(supervision, kind, folder)
    if artifacts.made:  # else nobody has traced
        for rank in ranks:
            stackdumps.settle(artifacts.path() / f"rank{rank.rank}", rank.rank)
    scenes = supervision.lookout.scenes
    meeting = supervision.meeting
    if meeting is not None:
        ranks, scenes = of_nodes.all_ranks(meeting, ranks, scenes, folder)
    looked = ending != "complete" or any(member.echoes for member in members)
    found = blame.explain(scenes) if looked else None
    verdict, cause = judge(
        ranks,
        ending,
        seconds=seconds,
        found=found.cause if found else None,
        waiting_for=blame.waiting_for(scenes),
    )
    advice = supervision.slow if verdict is Verdict.TIMED_OUT else ""
    if found is not None and cause is not None and cause.kind == found.cause.kind:
        advice = found.advice
    for rank in ranks:
        rank.fate = blame.fate(scenes[rank.rank]) if rank.rank in scenes else rank.fate
    scene.keep(members, folder, passed=verdict is Verdict.PASSED)
    agent_output = output.read(folder / "agent0" / "stderr.log") if kind == "script" else ""
    if supervision.failed_agents and not any(member.failed for member in members):
        verdict, cause = Verdict.CRASHED, _agent_failed(supervision.failed_agents[0], agent_output)
    if meeting is not None:
        verdict, cause, advice = of_nodes.verdict(meeting, ranks, verdict, cause, advice)
    return LaunchResult(
        verdict, cause, ranks, artifacts, seconds, supervision.leftovers, agent_output, advice=advice
    )


def _agent_failed(agent: dict[str, Any], text: str) -> Cause:
    """torchrun failed and none of its ranks did: it was killed, or its rendezvous did not come about."""
    if agent["signal"]:
        return Cause(None, "signal", f"torchrun was killed by {agent['signal']}")
    last = (text.strip().splitlines() or ["no output"])[-1]
    return Cause(None, "torchrun", f"torchrun left with exit code {agent['exit_code']}: {last}")
