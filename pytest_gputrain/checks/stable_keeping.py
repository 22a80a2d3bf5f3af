"""Where a stability run writes, what it is called by, and whether it goes on where an earlier one ended."""

from __future__ import annotations

import contextlib
import json
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pytest_gputrain.case import TrainingCase
from pytest_gputrain.checks.context import SESSION_REPORT, CheckContext
from pytest_gputrain.endurance import folder as folders
from pytest_gputrain.endurance.losses import write_losses
from pytest_gputrain.endurance.plan import StabilityOptions
from pytest_gputrain.endurance.progress import LAST_WORDS
from pytest_gputrain.endurance.records import StepRecord, path_of, read_records

STABILITY = "stability"


@dataclass(frozen=True)
class Keeping:
    """A run's folder. keeps: it stays after the run, and is resumed from.

    resume_at: the step of the checkpoint to go on from, 0 for none. recorded_until: the last step that a rank
    recorded then. notes: what was done with an earlier run.
    """

    folder: Path
    keeps: bool
    ranks: int
    settings: Mapping[str, Any]
    resume_at: int = 0
    recorded_until: int = 0
    notes: Sequence[str] = field(default=())

    def begun(self, options: StabilityOptions) -> None:
        """Write down what is run, and where. Raises StabilityUsageError where that cannot be."""
        if not self.keeps:
            return
        with folders.written_to(self.folder):
            folders.write_run(
                self.folder,
                {
                    "settings": dict(self.settings),
                    "losses": options.losses,
                    "loss_tolerance": options.loss_tolerance,
                    "seeding": "each draw and each step by seed, step and rank",
                    "environment": folders.environment(),
                    "resumed_at": self.resume_at,
                    "ended": None,
                },
            )

    def going_on(self) -> str:
        """What the same command does with what there is now."""
        if step := folders.last_checkpoint(self.folder, self.ranks):
            return f"the same command goes on from step {step} ({self.folder})"
        return f"the same command begins anew: there is no checkpoint yet ({self.folder})"

    def interrupted(self) -> None:
        """The ranks are gone: leave what is whole, and say at the very end what to do with it."""
        if not self.keeps:
            return
        folders.remove_unfinished(self.folder)
        done = min(records[-1].step if records else 0 for records in self.records())
        LAST_WORDS.append(
            f"stable_training[{self.settings['case']}]: stopped after step {done}; {self.going_on()}"
        )

    def ended(self, problem: str | None, **more: Any) -> None:
        """Write down how it ended; nothing is resumed from it any more."""
        if not self.keeps:
            return
        content = json.loads((self.folder / folders.RUN).read_text(encoding="utf-8"))
        content |= {"ended": "failed" if problem else "passed", "message": problem or "", **more}
        folders.write_run(self.folder, content)
        for rank in range(self.ranks):
            folders.remove_checkpoints(self.folder, rank)

    def keep_losses(self, losses: Mapping[int, float]) -> None:
        """As text, to compare with later."""
        if not self.keeps:
            return
        from pytest_gputrain.origin import origin

        where = origin()
        about = [
            "losses of a stability run, the mean of the ranks; compare with gputrain check --losses",
            ", ".join(f"{name} {value}" for name, value in self.settings.items()),
            f"torch {where['torch']}, python {where['python']}, {where['cpu']}, GPUs: {where['gpus']}",
        ]
        write_losses(self.folder / folders.LOSSES, losses, about)

    def records(self) -> list[tuple[StepRecord, ...]]:
        """By rank."""
        return [read_records(path_of(self.folder, rank)).records for rank in range(self.ranks)]


@contextlib.contextmanager
def kept(case: TrainingCase, ctx: CheckContext, options: StabilityOptions) -> Iterator[Keeping]:
    """Raises StabilityUsageError for a folder that holds an unfinished run of other settings."""
    ranks = options.ranks or ctx.world_size
    settings = {
        "case": case.name,
        "device": ctx.device,
        "world_size": ranks,
        "seed": ctx.seed,
        "batch_size": ctx.batch_size,
        "iterations": ctx.iterations,
    }
    below = options.folder or SESSION_REPORT.get()
    if below is None:
        with tempfile.TemporaryDirectory(prefix="gputrain-stability-") as path:
            yield Keeping(Path(path), False, ranks, settings)
        return
    folder = Path(below).absolute() / STABILITY / folders.name_of(case.name, ctx.device, ranks)
    with folders.held(folder):
        with folders.written_to(folder):
            earlier = _earlier(folder, settings)
        yield Keeping(folder, True, ranks, settings, *earlier)


def _earlier(folder: Path, settings: Mapping[str, Any]) -> tuple[int, int, list[str]]:
    """(the step to go on from, the last one that was recorded, notes)."""
    earlier = folders.look(folder, settings)
    if earlier is None:
        return 0, 0, []
    notes = list(earlier.notes)
    if earlier.finished or not earlier.step:
        kind = "a finished run" if earlier.finished else "a run that ended before its first checkpoint"
        notes.append(f"begun anew; {kind} of {earlier.ended_at} steps is kept in {folders.PREVIOUS}/")
        folders.set_aside(folder)
        return 0, 0, notes
    notes.append(f"resumed at step {earlier.step} after a run that ended at step {earlier.ended_at}")
    return earlier.step, earlier.ended_at, notes
