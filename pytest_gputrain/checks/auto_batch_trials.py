"""Runs of the training script, for the shipped tests of automatic batch size: each distinct one is run once.

A run is ``reference/train.py`` under torchrun or, for a user's case, its ``main`` on function ranks (a case
that a list holds has no name on a command line). Memory budgets are not guessed: the same script is run at
two batch sizes first, and a budget for n samples follows from the line through their peaks.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pytest_gputrain.case import TrainingCase
from pytest_gputrain.launch import LaunchResult

if TYPE_CHECKING:
    from pytest_gputrain.launch import Launcher

SCRIPT = Path(__file__).parents[1] / "reference" / "train.py"
MARGIN = 0.85
AMPLE = "1TB"  # only so that peaks are measured on a CPU too
# Batch sizes through which the line goes: below, temporaries of the optimizer may be the peak.
SMALL, LARGE = 4, 12
STEPS = 3  # the first makes the optimizer's state, the second needs everything at once
# As torchrun does for several ranks: threads that wait for each other cost more than such a small model does.
ONE_THREAD = {"OMP_NUM_THREADS": "1"}
# A model whose samples weigh as much as its parameters: on a GPU, memory comes in blocks of 2 MiB.
SHAPES = {
    "cpu": ("--depth=1", "--width=32", "--sequence_length=32"),
    "cuda": ("--depth=8", "--sequence_length=512", "--dtype=bfloat16"),
}


@dataclass(frozen=True)
class Trial:
    """One run. metrics: its last line, empty where it did not come to one."""

    result: LaunchResult
    metrics: Mapping[str, Any]

    @property
    def size(self) -> int:
        """The device batch size that it trained at."""
        return int(self.metrics["device_batch_size"])

    def printed(self, rank: int = 0) -> str:
        return self.result.ranks[rank].stdout

    @property
    def losses(self) -> list[float]:
        """The loss of every step, as printed."""
        lines = [line for line in self.printed().splitlines() if line.startswith("step ")]
        return [float(line.split("loss ")[1].split()[0]) for line in lines]

    @property
    def story(self) -> str:
        """Everything that tells why a run ended, for a look at what it says."""
        return self.result.summary() + "".join(rank.stdout + rank.stderr for rank in self.result.ranks)


@dataclass
class Trials:
    """What has been run so far, by everything that decides what a run does."""

    done: dict[Any, Trial] = field(default_factory=dict)


@dataclass(frozen=True)
class Subject:
    """What is trained: the script's own model (case None) or a user's case; device: "cpu" or "cuda"."""

    case: TrainingCase | None
    device: str

    @property
    def name(self) -> str:
        return self.case.name if self.case else "train"

    def train(
        self,
        launcher: Launcher,
        trials: Trials,
        *options: object,
        nproc: int = 1,
        shape: tuple[str, ...] | None = None,
        env: Mapping[str, str] | None = None,
        passing: bool = True,
        again: int = 0,
        timeout: float | None = None,
    ) -> Trial:
        """Run, or return what the same run came to before. ``again`` tells repetitions apart.

        passing: a run that does not pass fails the test with its cause; else it is returned as it is.
        timeout: seconds; None is the session's.
        """
        own = () if self.case else (shape or SHAPES[self.device])
        env = {**ONE_THREAD, **(env or {})} if self.device == "cpu" else env
        arguments = [f"--device={self.device}", f"--steps={STEPS}", *own, *map(str, options)]
        key = (self.name, self.device, tuple(arguments), nproc, tuple(sorted((env or {}).items())), again)
        if key not in trials.done:
            trials.done[key] = _trial(
                self._launch(launcher, arguments, nproc, env=env, check=passing, timeout=timeout)
            )
        return trials.done[key]

    def _launch(self, launcher: Launcher, arguments: list[str], nproc: int, **how: Any) -> LaunchResult:
        if self.case is None:
            return launcher.torchrun(str(SCRIPT), *arguments, nproc=nproc, **how)
        return launcher(_run_main, arguments, self.case, world_size=nproc, device=self.device, **how)

    def budget(
        self, launcher: Launcher, trials: Trials, samples: int, *options: str, nproc: int = 1, **more: Any
    ) -> int:
        """Bytes that hold ``samples`` samples a rank after the margin, and not one more."""
        # Data parallel buckets are the same on two ranks and on four.
        nproc = min(nproc, 2)
        small, large = (
            self.peak(launcher, trials, size, *options, nproc=nproc, **more) for size in (SMALL, LARGE)
        )
        per_sample = max(1.0, (large - small) / (LARGE - SMALL))
        return int((small + per_sample * (samples - SMALL + 0.5)) / MARGIN)

    def peak(
        self, launcher: Launcher, trials: Trials, size: int, *options: str, nproc: int = 1, **more: Any
    ) -> int:
        """Bytes of training at a batch size, evaluation included."""
        # A GPU tells its peak in any case, and no budget above what it has is accepted there.
        ample = (f"--memory_budget={AMPLE}",) if self.device == "cpu" else ()
        given = (f"--device_batch_size={size}", *ample, *options)
        return int(self.train(launcher, trials, *given, nproc=nproc, **more).metrics["peak_bytes"])


def _run_main(arguments: list[str], case: TrainingCase) -> None:
    """In a rank: the script's own entry, with a case in place of its model."""
    from pytest_gputrain.reference.train import main

    if code := main(arguments, case=case):
        sys.exit(code)


def _trial(result: LaunchResult) -> Trial:
    lines = result.ranks[0].stdout.strip().splitlines() if result.ranks else []
    metrics = json.loads(lines[-1]) if result.passed and lines else {}
    return Trial(result, metrics)
