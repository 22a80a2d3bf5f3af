"""Runs a plan: each phase a launch with its own deadline, in its own folder. One that fails stops nothing."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from pytest_gputrain.diagnose import artifacts, environment, outcome, parity, readings
from pytest_gputrain.diagnose.bisect import Range, smallest_failing
from pytest_gputrain.diagnose.phases import Given, range_text, with_branches
from pytest_gputrain.diagnose.programs import Program
from pytest_gputrain.diagnose.records import Outcome, Phase, PhaseResult
from pytest_gputrain.diagnose.report import Report
from pytest_gputrain.launch import LaunchDefaults, Launcher, LaunchUsageError
from pytest_gputrain.launch.output import rank_list
from pytest_gputrain.launch.result import LaunchResult
from pytest_gputrain.origin import origin


@dataclass(frozen=True, kw_only=True)
class Settings:
    """out: the folder of the report, there and empty. launch: times, device and GPUs of each launch."""

    out: Path
    launch: LaunchDefaults

    @property
    def device(self) -> str:
        """Where ranks run."""
        return self.launch.device

    def launcher(self, folder: Path) -> Launcher:
        """What starts the ranks of a launch, with its files in ``folder``."""
        return Launcher(defaults=replace(self.launch, artifacts=folder))


Told = Callable[[str], None]


@dataclass
class Plan:
    """The phases of one program, run in order. ``tell`` gets a line for each that ends."""

    program: Program
    given: Given
    phases: Sequence[Phase]
    settings: Settings
    tell: Told = print
    results: list[PhaseResult] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._log = artifacts.ExecutionLog(self.settings.out)
        self._folders: dict[str, Path] = {}
        self._layers = 0
        self._branches: list[str] = []
        self._notes: dict[str, None] = {}
        self._shared: dict[str, None] = {}
        self._launches = 0

    def run(self) -> Report:
        """All phases; whatever happens, what is known is written.

        Raises KeyboardInterrupt after that when interrupted. The report then says that it is incomplete.
        """
        self._log.line(f"plan for {self.program.command}: {', '.join(phase.name for phase in self.phases)}")
        try:
            while len(self.results) < len(self.phases):
                phase = self.phases[len(self.results)]
                if phase.name == "branches" and self._branches:
                    self.phases = with_branches(self.phases, self.given, self._branches)
                    continue
                self._log.line(f"{phase.name}: {phase.title}")
                result = self._phase(phase)
                self.results.append(result)
                self._log.result(result)
                self.tell(artifacts.line_of(result))
        finally:
            report = self.report()
            artifacts.write(report, self.settings.out)
            self._log.line(report.headline)
        return report

    def report(self) -> Report:
        """What is known so far."""
        return Report(
            self.program.command,
            self.program.kind,
            tuple(self.results),
            len(self.phases),
            self.settings.device,
            origin(),
            tuple(self._notes),
            tuple(self._shared),
        )

    # -- phases -------------------------------------------------------------------------------------

    def _phase(self, phase: Phase) -> PhaseResult:
        if reason := phase.skip or self._pointless(phase):
            return PhaseResult(phase, Outcome.SKIPPED, reason)
        if phase.name == "checkpointing":
            return self._checkpointing(phase)
        if phase.name == "gradient_parity":
            return self._parity(phase)
        return self._launch(phase)

    def _pointless(self, phase: Phase) -> str:
        """Why a phase need not run after what the others came to."""
        if not phase.alone and (gone := self.program.nodes_gone):
            return gone
        ran_on = next((result.backend for result in self.results if result.backend), "")
        if phase.name == "gloo" and ran_on and "nccl" not in ran_on:
            return f"the phases above ran on {ran_on} already"
        if phase.name in ("checkpointing", "gradient_parity"):
            alone = next((result for result in self.results if result.phase.name == "single"), None)
            if alone is not None and alone.bad:
                return f"without checkpointing it came to {alone.outcome} already"
            full = next((result for result in self.results if result.phase.name == "checkpointing"), None)
            if phase.name == "gradient_parity" and full is not None and full.bad:
                return f"with checkpointing it came to {full.outcome} already"
            if alone is not None and not self._layers:
                return "the model has no list of layers (nn.ModuleList) to checkpoint"
        return ""

    def _checkpointing(self, phase: Phase) -> PhaseResult:
        result = self._launch(phase)
        if not result.bad:
            return result
        start, end = phase.layers or (0, None)
        whole = (start, self._layers if end is None else end)
        if whole[1] <= whole[0]:
            return result
        return replace(result, range=smallest_failing(whole, lambda part: self._part(phase, part).bad))

    def _part(self, phase: Phase, part: Range) -> PhaseResult:
        """The same phase over fewer layers."""
        result = self._launch(_of(phase, part))
        self._log.result(result)
        return result

    def _parity(self, phase: Phase) -> PhaseResult:
        """Gradients with checkpointing against those without; where they differ, bisected."""
        began = time.monotonic()
        reference = self._gradients(replace(phase, name="single", layers=None, switches=_without(phase)))
        result = self._compared(phase, reference)
        if not result.bad or reference is None:
            return replace(result, seconds=time.monotonic() - began)
        again = replace(phase, name="single_again", layers=None, switches=_without(phase))
        noise = parity.worst_difference(reference, self._gradients(again) or [])
        if noise is not None and noise.size * parity.NOISE_FACTOR > parity.TOLERANCE:
            reason = f"without checkpointing the same seeded step twice differs by {noise.size:.1%}"
            return PhaseResult(phase, Outcome.SKIPPED, reason, seconds=time.monotonic() - began)
        start, end = phase.layers or (0, None)
        whole = (start, self._layers if end is None else end)
        if whole[1] > whole[0]:
            smallest = smallest_failing(whole, lambda part: self._compared(_of(phase, part), reference).bad)
            result = replace(result, range=smallest)
        return replace(result, seconds=time.monotonic() - began)

    def _compared(self, phase: Phase, reference: list[parity.Gradients] | None) -> PhaseResult:
        """One checkpointed run against the reference."""
        name = "checkpointing" if phase.name == "gradient_parity" else phase.name
        seen = self._gradients(replace(phase, name=name))
        folder = self._folders[name].name
        if not reference or not seen:
            missing = "with" if reference else "without"
            reason = f"no gradients were seen {missing} checkpointing: no torch optimizer stepped"
            return PhaseResult(phase, Outcome.SKIPPED, reason, folder=folder)
        worst = parity.worst_difference(reference, seen)
        if worst is None or worst.size <= parity.TOLERANCE:
            size = worst.size if worst else 0.0
            note = f"{len(reference)} steps, worst difference {size:.1e} of a gradient"
            return PhaseResult(phase, Outcome.PASS, notes=(note,), folder=folder)
        cause = (
            f"gradients differ in step {worst.step}: {worst.parameters} parameters, worst {worst.name} by "
            f"{worst.size:.1%}"
        )
        return PhaseResult(phase, Outcome.FAIL, cause, "parity", folder=folder)

    def _gradients(self, phase: Phase) -> list[parity.Gradients] | None:
        """What the phase's one rank noted; it is launched unless it was."""
        if phase.name not in self._folders:
            self._log.result(self._launch(phase))
        return list(readings.gradients(self._folders[phase.name])) or None

    # -- launches -----------------------------------------------------------------------------------

    def _launch(self, phase: Phase) -> PhaseResult:
        settings = self.settings
        self._launches += 1
        folder = settings.out / f"{self._launches:02d}-{phase.name.replace(':', '-')}"
        folder.mkdir()
        self._folders[phase.name] = folder
        on_top = environment.added(os.environ, phase.switches, device=settings.device)
        on_top["GPUTRAIN_STUDY"] = str(folder.absolute())
        try:
            launched = self.program.launch(phase, settings.launcher(folder / "launch"), on_top)
        except LaunchUsageError as error:
            result = PhaseResult(phase, Outcome.FAIL, f"could not be launched: {error}", "usage")
        else:
            result = self._result(phase, launched, folder)
        result = replace(result, folder=folder.name, environment=environment.recorded(os.environ, on_top))
        artifacts.write_phase(result, folder)
        return result

    def _result(self, phase: Phase, launched: LaunchResult, folder: Path) -> PhaseResult:
        """The launch's folder becomes the phase's."""
        for path in list(launched.artifacts.iterdir()):
            shutil.move(path, folder / path.name)
        shutil.rmtree(folder / "launch")
        launched.artifacts = folder
        facts = readings.facts(folder)
        self._layers = max([self._layers, *(int(told.get("layers", 0)) for told in facts.values())])
        self._branches = next((told["branches"] for told in facts.values() if told.get("branches")), [])
        self._notes |= dict.fromkeys([note for note in [outcome.replaced_backend(facts)] if note])
        self._shared |= dict.fromkeys(launched.labels)
        self._notes |= dict.fromkeys([note for note in [_machines(launched)] if note])
        steps = {rank: len(told.get("steps", ())) for rank, told in facts.items()}
        missing = readings.missing(readings.traces(folder), None if launched.passed else steps)
        result = outcome.phase_result(
            phase,
            launched.verdict,
            launched.cause,
            facts,
            missing,
            seconds=launched.seconds,
            likely=launched.likely,
        )
        artifacts.write_launch(launched, folder)
        return result


def _machines(launched: LaunchResult) -> str:
    """``ranks on 2 machines: host-a (ranks 0-3), host-b (ranks 4-7)``; empty for one."""
    hosts: dict[str, list[int]] = {}
    for rank in launched.ranks:
        if rank.host:
            hosts.setdefault(f"node {rank.node} ({rank.host}", []).append(rank.rank)
    parts = [f"{host}, {rank_list(ranks)})" for host, ranks in hosts.items()]
    return f"ranks on {len(parts)} machines: {', '.join(parts)}" if len(parts) > 1 else ""


def _without(phase: Phase) -> dict[str, str]:
    return {name: value for name, value in phase.switches.items() if name != "GPUTRAIN_GC_RANGE"}


def _of(phase: Phase, part: Range) -> Phase:
    switches = {**phase.switches, "GPUTRAIN_GC_RANGE": range_text(part)}
    return replace(phase, name=f"checkpointing_{part[0]}-{part[1]}", switches=switches, layers=part)
