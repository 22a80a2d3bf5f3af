"""What a plan came to as a whole, and its exit code. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from pytest_gputrain.diagnose import tree
from pytest_gputrain.diagnose.records import Outcome, PhaseResult
from pytest_gputrain.schemas import head


@dataclass(frozen=True)
class Report:
    """The results so far, and what the tree makes of them.

    program: how it was named; kind: what it is. planned: how many phases there were to be; fewer results
    mean that it was interrupted. origin: on which machine and versions. shared_gpu: labels of launches whose
    ranks shared a GPU.
    """

    program: str
    kind: str
    results: Sequence[PhaseResult]
    planned: int
    device: str
    origin: Mapping[str, Any] = field(default_factory=dict)
    notes: Sequence[str] = ()
    shared_gpu: Sequence[str] = ()

    @property
    def interrupted(self) -> bool:
        return len(self.results) < self.planned

    @property
    def decision(self) -> tree.Decision:
        return tree.decide(self.results, interrupted=self.interrupted)

    @property
    def culprit(self) -> PhaseResult | None:
        """The phase whose cause is to be read first."""
        red = [result for result in self.results if result.red and result.phase.accuses]
        return tree.first_failure(self.results) or next(iter(red), None)

    @property
    def verdict(self) -> str:
        """``PASS``; ``INTERRUPTED``; ``NOTHING RAN``; else the culprit's outcome. Only PASS is green."""
        if self.culprit is not None:
            return str(self.culprit.outcome)
        if self.interrupted:
            return "INTERRUPTED"
        ran = [result for result in self.results if result.outcome is not Outcome.SKIPPED]
        return "PASS" if ran else "NOTHING RAN"

    @property
    def headline(self) -> str:
        """The line to read first."""
        if (culprit := self.culprit) is not None:
            where = f"   at {culprit.location}" if culprit.location else ""
            return f"{culprit.outcome} in {culprit.phase.name}: {culprit.cause}{where}"
        if self.verdict == "PASS":
            ran = sum(result.outcome is not Outcome.SKIPPED for result in self.results)
            return f"PASS: {ran} phases ran, nothing accuses the program"
        if self.verdict == "INTERRUPTED":
            return f"INTERRUPTED after {len(self.results)} of {self.planned} phases: proves nothing"
        return "NOTHING RAN: every phase was skipped, which proves nothing"

    @property
    def also_seen(self) -> list[PhaseResult]:
        """What went wrong only in phases that accuse nobody."""
        return [result for result in self.results if result.red and not result.phase.accuses]

    def text(self) -> str:
        """Headline, the path of the decision, and the advice, for a terminal."""
        decision = self.decision
        return "\n".join(
            [
                self.headline,
                *(f"  {label}" for label in self.shared_gpu),
                "",
                "how that was decided:",
                *(f"  {step}" for step in decision.path),
                "",
                "what to change:",
                *(f"  {number}. {one.text}" for number, one in enumerate(decision.advice, start=1)),
            ]
        )

    def document(self) -> dict[str, Any]:
        """``report.json``."""
        decision = self.decision
        return {
            **head("gputrain.diagnose"),
            "verdict": self.verdict,
            "headline": self.headline,
            "program": self.program,
            "kind": self.kind,
            "device": self.device,
            "interrupted": self.interrupted,
            "notes": [*self.shared_gpu, *self.notes],
            "origin": dict(self.origin),
            "phases": [_phase(result) for result in self.results],
            "path": list(decision.path),
            "advice": [{"kind": one.kind, "text": one.text} for one in decision.advice],
        }


def _phase(result: PhaseResult) -> dict[str, Any]:
    return {
        "name": result.phase.name,
        "title": result.phase.title,
        "outcome": str(result.outcome),
        "accuses": result.phase.accuses,
        "cause": result.cause,
        "kind": result.kind,
        "location": result.location,
        "likely": result.likely,
        "seconds": round(result.seconds, 3),
        "backend": result.backend,
        "missing": [
            {"name": one.name, "ranks": one.ranks, "steps": one.steps, "everywhere": one.everywhere}
            for one in result.missing
        ],
        "range": result.range,
        "profile": result.profile,
        "notes": list(result.notes),
        "folder": result.folder,
        "environment": dict(result.environment),
    }
