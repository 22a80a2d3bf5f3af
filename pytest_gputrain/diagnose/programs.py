"""What a plan is run on: a script, a module, or a case. Each knows how to be launched for a phase."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from pytest_gputrain.diagnose.records import Kind, Phase

if TYPE_CHECKING:
    from pytest_gputrain.case import TrainingCase
    from pytest_gputrain.diagnose.nodes import Session
    from pytest_gputrain.launch import Launcher
    from pytest_gputrain.launch.nodes.where import Where
    from pytest_gputrain.launch.result import LaunchResult


class Program(Protocol):
    """Something that trains."""

    @property
    def kind(self) -> Kind:
        """What it is."""

    @property
    def name(self) -> str:
        """A short name, for folders and headings."""

    @property
    def command(self) -> str:
        """How a person would name it."""

    @property
    def nodes_gone(self) -> str:
        """Why its ranks on other machines cannot run any more; empty while they can."""

    def launch(self, phase: Phase, launcher: Launcher, environ: Mapping[str, str]) -> LaunchResult:
        """One launch, whatever it comes to. Raises LaunchUsageError."""


@dataclass(frozen=True)
class Script:
    """An unmodified script, or with ``module`` a module as ``python -m`` runs it.

    nnodes: machines, each with ``nproc`` ranks; without ``where`` they are played on this one. session: what
    tells the other machines of a phase, on node 0.
    """

    path: str
    argv: tuple[str, ...] = ()
    module: bool = False
    nproc: int = 2
    nnodes: int = 1
    where: Where | None = None
    session: Session | None = None

    @property
    def kind(self) -> Kind:
        return "module" if self.module else "script"

    @property
    def name(self) -> str:
        from pathlib import Path

        return self.path.rpartition(".")[2] if self.module else Path(self.path).stem

    @property
    def nodes_gone(self) -> str:
        return self.session.gone() if self.session is not None else ""

    @property
    def command(self) -> str:
        return " ".join([*(["-m"] if self.module else []), self.path, *self.argv])

    def launch(self, phase: Phase, launcher: Launcher, environ: Mapping[str, str]) -> LaunchResult:
        """Under torch's elastic agent; it stops after the phase's steps by a switch."""
        nnodes = 1 if phase.alone else self.nnodes
        if self.session is not None:
            self.session.announce(phase)
        meets = self.where if nnodes > 1 else None
        limit = {} if phase.steps is None else {"GPUTRAIN_MAX_STEPS": str(phase.steps)}
        return launcher.torchrun(
            self.path,
            *self.argv,
            nproc=phase.ranks,
            nnodes=nnodes,
            node_rank=meets.node_rank if meets else None,
            rdzv_endpoint=meets.endpoint if meets else None,
            module=self.module,
            env={**environ, **limit},
            trace=True,
            check=False,
        )


@dataclass(frozen=True)
class Case:
    """A training case. ``spec`` is how it was named, where it was."""

    case: TrainingCase
    spec: str = ""

    @property
    def kind(self) -> Kind:
        return "case"

    @property
    def name(self) -> str:
        return self.case.name

    @property
    def nodes_gone(self) -> str:
        return ""

    @property
    def command(self) -> str:
        return f"--case {self.spec}" if self.spec else f"case {self.case.name}"

    def launch(self, phase: Phase, launcher: Launcher, environ: Mapping[str, str]) -> LaunchResult:
        """The case's own loop for the phase's steps, on ranks with the process group ready."""
        from pytest_gputrain.diagnose.case_loop import How, train

        assert phase.steps is not None
        device = launcher.defaults.device
        how = How(steps=phase.steps, device=device, wrap=phase.wrap, layers=phase.layers)
        own: dict[str, Any] = dict(environ)
        if self.case.set_checkpointing is not None:  # it is turned on by the case's own means
            own["GPUTRAIN_GC_RANGE"] = None
        backend = "gloo" if device == "cuda" and environ.get("GPUTRAIN_BACKEND") == "gloo" else None
        return launcher(
            train,
            self.case,
            how,
            world_size=phase.ranks,
            backend=backend,
            env=own,
            trace=True,
            check=False,
        )
