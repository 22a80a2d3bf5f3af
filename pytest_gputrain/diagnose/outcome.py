"""From what a launch came to, and what its ranks told, to the result of a phase. Pure."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import replace
from statistics import median
from typing import Any

from pytest_gputrain.diagnose.records import Missing, Outcome, Phase, PhaseResult
from pytest_gputrain.launch.records import Cause, Verdict, without_gradient

Facts = Mapping[int, Mapping[str, Any]]

_OUTCOMES = {
    Verdict.PASSED: Outcome.PASS,
    Verdict.FAILED: Outcome.FAIL,
    Verdict.CRASHED: Outcome.CRASH,
    Verdict.HUNG: Outcome.HANG,
    Verdict.TIMED_OUT: Outcome.SLOW,
    Verdict.SKIPPED: Outcome.SKIPPED,
}
# A step that took so many times the median, and so many seconds, is told as slow though all is finished. The
# first is never: it allocates, compiles and fills caches.
_FAR_LONGER, _LONG_SECONDS = 5.0, 10.0
_SHOWN = 4
_UNREDUCED = "no gradient in the last step for "
# What a rank raises when a switch finds nothing to change: a run without its effect proves nothing.
_SWITCH = "SwitchError: "


def phase_result(
    phase: Phase,
    verdict: Verdict,
    cause: Cause | None,
    facts: Facts,
    missing: tuple[Missing, ...] = (),
    *,
    seconds: float = 0.0,
    likely: str = "",
) -> PhaseResult:
    """What the phase came to."""
    backend = next((str(told["backend"]) for told in facts.values() if "backend" in told), "")
    result = PhaseResult(
        phase,
        _OUTCOMES[verdict],
        cause.message if cause else "",
        cause.kind if cause else "",
        cause.location if cause else None,
        seconds=seconds,
        missing=missing,
        likely=likely + _uneven(cause, facts),
        backend=backend,
    )
    if cause is not None and _SWITCH in cause.message:
        return replace(result, outcome=Outcome.SKIPPED, cause=_lacking(cause.message), location=None)
    if (
        cause is not None and cause.kind == "node"
    ):  # waiting for a machine in vain is no hang of the program's
        return replace(result, outcome=Outcome.CRASH)
    if verdict is Verdict.TIMED_OUT:
        return _at_the_deadline(result, facts)
    if verdict is Verdict.PASSED:
        return _finished(result, facts)
    if verdict is Verdict.FAILED and missing and _UNREDUCED in result.cause:
        # In the order of the model, with those of all ranks; DDP's own list has one rank's, sorted by name.
        who = result.cause.partition(_UNREDUCED)[0]
        return replace(result, cause=who + without_gradient([one.name for one in missing]))
    return result


def _uneven(cause: Cause | None, facts: Facts) -> str:
    """How far each rank was when one of them left the others behind."""
    steps = {rank: len(told.get("steps", ())) for rank, told in sorted(facts.items())}
    if cause is None or cause.kind != "left" or cause.rank not in steps or len(steps) < 2:
        return ""
    others = [f"rank {rank} was in step {count + 1}" for rank, count in steps.items() if rank != cause.rank]
    more = f" and {len(others) - _SHOWN} more" if len(others) > _SHOWN else ""
    left = f"rank {cause.rank} finished after {steps[cause.rank]} steps"
    return f" ({left}, {', '.join(others[:_SHOWN])}{more})"


def _lacking(message: str) -> str:
    """Of the error that a switch without effect makes, what the program lacks."""
    said = message.partition(_SWITCH)[2]
    _, is_set, lacks = said.partition(" is set, but ")
    return lacks.removesuffix("; unset it") if is_set else said


def _at_the_deadline(result: PhaseResult, facts: Facts) -> PhaseResult:
    """Ranks still made progress. A program that trains for hours is well; too few steps is slow."""
    steps = min((len(told.get("steps", ())) for told in facts.values()), default=0)
    result = replace(result, finished=False, profile=_profile(result, facts))
    if result.phase.steps is None and steps > 1:
        note = f"still training at the deadline: {steps} steps in {result.seconds:.0f} s, not to its end"
        return replace(result, outcome=Outcome.PASS, cause="", notes=(*result.notes, note))
    return result


def _finished(result: PhaseResult, facts: Facts) -> PhaseResult:
    """What ended well proves something only by the steps that it took."""
    fewest = min((len(told.get("steps", ())) for told in facts.values()), default=0)
    if not facts:
        nothing = "the program ended before it trained or made a process group, so nothing was tried"
        return replace(result, outcome=Outcome.SKIPPED, cause=nothing)
    if not fewest:  # one that updates its parameters by hand takes steps that nobody sees
        result = replace(result, notes=(*result.notes, "no step of a torch optimizer was seen"))
    elif result.phase.steps is not None and fewest < result.phase.steps:
        note = f"the program ended by itself after {fewest} of {result.phase.steps} steps"
        result = replace(result, notes=(*result.notes, note))
    for rank, told in facts.items():
        durations = step_durations(told)[1:]
        usual = median(durations) if len(durations) > 1 else None
        longest = max(durations, default=0.0)
        if usual is not None and longest > max(_FAR_LONGER * usual, _LONG_SECONDS):
            step = durations.index(longest) + 2
            cause = f"step {step} on rank {rank} took {longest:.1f} s, the others {usual:.1f} s"
            profile = _profile(result, facts)
            return replace(result, outcome=Outcome.SLOW, cause=cause, kind="slow", profile=profile)
    return result


def replaced_backend(facts: Facts) -> str:
    """What a reader must know of the backend; empty if the program ran on what it asks for."""
    told = next(iter(facts.values()), {})
    asked, used = told.get("asked"), told.get("backend")
    return f"the program asks for {asked} and ran on {used}" if asked and used not in asked else ""


def _profile(result: PhaseResult, facts: Facts) -> str:
    """Where the time goes, in one sentence."""
    parts = []
    for rank, told in facts.items():
        durations = step_durations(told)
        if durations:
            shown = ", ".join(f"{seconds:.1f}" for seconds in durations[:_SHOWN])
            more = f" and {len(durations) - _SHOWN} more" if len(durations) > _SHOWN else ""
            parts.append(f"steps of rank {rank} took {shown} s{more}")
    if not parts:
        parts.append("no optimizer step was finished")
    if result.location:
        parts.append(f"at the end it was at {result.location}")
    return "; ".join(parts[:_SHOWN])


def step_durations(told: Mapping[str, Any]) -> list[float]:
    """Seconds of each step, the first from the start of the rank."""
    times = [told["began"], *told.get("steps", ())] if "began" in told else []
    return [later - earlier for earlier, later in itertools.pairwise(times)]
