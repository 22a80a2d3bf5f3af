"""The decision tree: from what the phases came to, to the sentence that says what to change. Pure, and shown.

Each question is asked of what ran; one that was not run answers "not run" and decides nothing. The first
advice is the most telling, the others follow; there is always one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from pytest_gputrain.diagnose import advice
from pytest_gputrain.diagnose.advice import Advice
from pytest_gputrain.diagnose.records import Missing, Outcome, PhaseResult


@dataclass(frozen=True)
class Decision:
    """path: the questions with their answers, in order. advice: what to change, the first thing first."""

    path: tuple[str, ...]
    advice: tuple[Advice, ...]


@dataclass
class _Walk:
    results: Sequence[PhaseResult]
    path: list[str] = field(default_factory=list)
    found: list[Advice] = field(default_factory=list)

    def ask(self, question: str, answer: bool | None, then: Advice | None = None, said: str = "") -> bool:
        """Note a question and its answer; with yes, what follows from it."""
        word = "not run" if answer is None else "yes" if answer else "no"
        leaf = f" -> {then.kind}" if answer and then else ""
        self.path.append(f"{question} {said or word}{leaf}")
        if answer and then is not None:
            self.found.append(then)
        return bool(answer)

    def group(self, name: str) -> list[PhaseResult]:
        """What ran of a group."""
        return [r for r in self.results if r.phase.group == name and r.outcome is not Outcome.SKIPPED]

    def one(self, name: str) -> PhaseResult | None:
        """What ran of a phase."""
        ran = (r for r in self.results if r.phase.name == name and r.outcome is not Outcome.SKIPPED)
        return next(ran, None)


def decide(results: Sequence[PhaseResult], *, interrupted: bool = False) -> Decision:
    """What the results say. ``interrupted``: phases are missing, so a pass proves nothing."""
    walk = _Walk(results)
    program = walk.group("program")
    failed = [result for result in program if result.bad]
    if program:
        walk.ask("Did the program itself fail?", bool(failed), said=_list(failed))
    else:
        walk.ask("Did the program itself fail?", None)
    if failed:
        _why_it_failed(walk, _most_telling(failed))
    _branches(walk)
    _missing(walk)
    _checkpointing(walk)
    _other_backend(walk, failed)
    _slow(walk)
    _last_resort(walk, failed, interrupted)
    return Decision(tuple(walk.path), tuple(walk.found))


def first_failure(results: Sequence[PhaseResult]) -> PhaseResult | None:
    """The phase whose cause is told first: of those that accuse, the program's own before the others."""
    bad = [result for result in results if result.bad and result.phase.accuses]
    return _most_telling([r for r in bad if r.phase.group == "program"] or bad) if bad else None


def _most_telling(failed: Sequence[PhaseResult]) -> PhaseResult:
    """A hang or crash says more than what was raised because of it; then the earliest."""
    return next((r for r in failed if r.outcome is Outcome.HANG), failed[0])


def _why_it_failed(walk: _Walk, failure: PhaseResult) -> None:
    single = walk.one("single")
    same = single is not None and single.bad
    if walk.ask("Does it fail in a single process too?", same if single else None, _alone(single)):
        return
    # A failure that the launch explains (a rank returned, a collective under `if`) is its own advice: another
    # way of wrapping cannot mend it, even where it happens to pass.
    if failure.kind not in ("", "exception"):
        walk.found.append(advice.raised(failure))
    # The others take only the first steps: that they pass says nothing of a later one.
    early = any(result.phase.steps is not None for result in walk.group("program") if result.bad)
    if not walk.ask("Does it fail within the first steps?", early):
        return
    static, unused, fsdp2 = (walk.one(name) for name in ("static_graph", "find_unused", "fsdp2"))
    static_passes = _passes(static)
    if walk.ask("Does it pass with a static graph?", static_passes, advice.static_graph()):
        return
    if walk.ask("Does it pass with find_unused_parameters?", _passes(unused), advice.find_unused()):
        return
    walk.ask("Does it pass under FSDP2?", _passes(fsdp2), advice.fsdp2())


def _alone(single: PhaseResult | None) -> Advice | None:
    return advice.alone(single) if single is not None and single.bad else None


def _passes(result: PhaseResult | None) -> bool | None:
    return None if result is None else result.outcome is Outcome.PASS


def _branches(walk: _Walk) -> None:
    ran = walk.group("branch")
    failed = [result for result in ran if result.bad]
    question = "Does a branch fail alone?"
    if not failed:
        walk.ask(question, False if ran else None)
    elif len(failed) == len(ran) and len(ran) > 1:
        walk.ask(question, True, advice.all_branches(failed), said="all of them")
    else:
        walk.ask(question, True, said=f"{_list(failed)} -> branch")
        walk.found.insert(0, advice.branch(failed))


def _missing(walk: _Walk) -> None:
    """Of the program as it is: a branch alone leaves the others' parameters out, on purpose."""
    seen: dict[str, Missing] = {}
    for result in walk.group("program"):
        for parameter in result.missing:
            known = seen.get(parameter.name)
            # Consistent only if it is so in every phase that saw it.
            if known is None or (known.everywhere and not parameter.everywhere):
                seen[parameter.name] = parameter
    always = [one for one in seen.values() if one.everywhere]
    sometimes = [one for one in seen.values() if not one.everywhere]
    if walk.ask("Are the same parameters always without a gradient?", bool(always), said=_count(always)):
        walk.found.insert(0, advice.missing(always))
    if walk.ask("Are some without one now and then?", bool(sometimes), said=_count(sometimes)):
        walk.found.insert(0 if not always else 1, advice.missing_differs(sometimes))


def _checkpointing(walk: _Walk) -> None:
    ran = walk.group("checkpointing")
    failed = [result for result in ran if result.bad]
    if not failed:
        walk.ask("Does activation checkpointing fail?", False if ran else None)
        return
    single = walk.one("single")
    if single is not None and single.bad:
        walk.ask("Does activation checkpointing fail?", False, said="yes, as without it")
        return
    ranged = next((result for result in failed if result.range is not None), None)
    whole = next((result for result in failed if result.phase.name == "checkpointing"), None)
    leaf = advice.layer(ranged) if ranged else advice.checkpointing(whole) if whole else None
    walk.ask("Does activation checkpointing fail?", True, leaf or advice.parity(failed[0]))


def _other_backend(walk: _Walk, failed: Sequence[PhaseResult]) -> None:
    hung = next((result for result in failed if result.outcome is Outcome.HANG), None)
    if hung is None:
        return
    gloo = walk.one("gloo")
    if hung.backend != "nccl":
        walk.ask("Does it hang on gloo?", True, advice.on_gloo(hung, both=False))
    elif gloo is None:
        walk.ask("Does it hang on gloo too?", None)
    elif gloo.outcome is Outcome.HANG:
        walk.ask("Does it hang on gloo too?", True, advice.on_gloo(gloo, both=True))
    else:
        walk.ask("Does it hang only on NCCL?", gloo.outcome is Outcome.PASS, advice.transport(hung))


def _slow(walk: _Walk) -> None:
    slow = [result for result in walk.results if result.outcome is Outcome.SLOW]
    if walk.ask("Was a phase slow?", bool(slow), said=_list(slow)):
        walk.found.append(advice.slow(slow))


def _last_resort(walk: _Walk, failed: Sequence[PhaseResult], interrupted: bool) -> None:
    """Never without advice; and what is well is said before what was also seen."""
    accused = [result for result in walk.results if result.red and result.phase.accuses]
    ran = any(result.outcome is not Outcome.SKIPPED for result in walk.results)
    if interrupted:
        walk.found.append(advice.interrupted())
    elif not accused:
        walk.found.insert(0, advice.healthy() if ran else advice.nothing_ran())
    if failed and not any(found.kind == "own_error" for found in walk.found):
        walk.found.append(advice.raised(_most_telling(failed)))
    if not walk.found:
        walk.found.append(advice.raised(accused[0]))


def _list(results: Sequence[PhaseResult]) -> str:
    return ", ".join(f"{result.phase.name} {result.outcome}" for result in results) or "no"


def _count(parameters: Sequence[Missing]) -> str:
    return f"yes, {len(parameters)}" if parameters else "no"
