"""What a launch came to, and how it reads: the cause first, the victims below, output last."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from . import output
from .aftermath import Aftermath
from .folder import Folder
from .records import Cause, RankResult, Verdict

_OUTPUT_LINES = 20
_TRACE_LINES = 30
_LIKELY = {
    "left": "ranks ran a different number of steps, or only some of them came to this collective; "
    "give every rank the same number of batches, or use torch.distributed.algorithms.Join",
    "slow": "too little time, or a loop that does not end; more time is timeout=SECONDS",
    "deadlock": "ranks entered different collectives, or the same ones in a different order",
    "SIGKILL": "the kernel's out-of-memory killer, if nobody else sent it: `dmesg | grep -i kill` tells",
    "SIGABRT": "a collective with different shapes or dtypes on the ranks aborts like this on gloo, "
    "and so does a failed assertion in C++; its last words are in stderr below",
    "skip": "a condition that differs between ranks; decide before the launch, or alike on all ranks",
}
"""What is usually behind a symptom; said as likely, since it was not proved."""


@dataclass
class LaunchResult:
    """A finished launch. Nothing that it started is running any more.

    ``seconds`` runs from the fork of the first rank to the verdict.
    ``exit_code`` is what torchrun would have returned (scripts) or 0 and 1 (functions). ``shared_gpu`` says
    so where ranks shared GPUs: no figure of such a launch counts as one of several GPUs. ``simulated_nodes``
    is the number of nodes that were played on one host, else 0.
    """

    verdict: Verdict
    cause: Cause | None
    ranks: list[RankResult]
    folder: Folder
    seconds: float
    leftovers: list[str] = field(default_factory=list)
    agent_output: str = ""
    advice: str = ""
    shared_gpu: str | None = None
    simulated_nodes: int = 0
    aftermath: Aftermath = field(default_factory=Aftermath, repr=False)

    @property
    def artifacts(self) -> Path:
        """The folder with each rank's ``stdout.log``, ``stderr.log`` and ``stacks.txt``.

        It lives at least as long as this object. Of a warm launch that passed and printed nothing it is made
        when it is asked for.
        """
        return self.folder.path()

    @artifacts.setter
    def artifacts(self, path: Path) -> None:
        self.folder = Folder.at(path)

    @property
    def recycled(self) -> str | None:
        """Why the ranks of a warm launch were ended; None if they were kept for the next one.

        Ranks look for most of what a function may leave behind after they have reported: this waits for them.
        """
        return self.aftermath.reason()

    @property
    def values(self) -> list[Any]:
        """What the function returned, by rank. None for ranks that did not pass."""
        return [rank.value for rank in self.ranks]

    @property
    def passed(self) -> bool:
        """Whether every rank positively reported success."""
        return self.verdict is Verdict.PASSED

    @property
    def labels(self) -> list[str]:
        """What has to be said wherever this result is shown."""
        simulated = f"{self.simulated_nodes} nodes simulated on one host" if self.simulated_nodes else None
        return [label for label in (self.shared_gpu, simulated) if label]

    @property
    def exit_code(self) -> int:
        """0 if PASSED, else 1: what torchrun returns."""
        return 0 if self.passed else 1

    @property
    def likely(self) -> str:
        """What is usually behind the cause; empty where nothing is known."""
        if self.cause is None:
            return ""
        return self.advice or _LIKELY.get(self._symptom(self.cause), "")

    def summary(self, *, printed: bool = True) -> str:
        """The whole text of a launch that did not pass. Its first line alone says what to mend.

        Without ``printed`` it leaves out what ranks printed and where that is kept.
        """
        if self.passed:
            label = "".join(f" ({label})" for label in self.labels)
            return f"PASSED: {output.rank_list(r.rank for r in self.ranks)} in {self.seconds:.1f} s{label}"
        if self.verdict is Verdict.SKIPPED:
            return f"SKIPPED: {self.cause}"
        lines = [f"{self.verdict} after {self.seconds:.1f} s: {self.cause}"]
        lines += [f"  {label}" for label in self.labels]
        lines += [f"  {line}" for line in self._others()]
        if self.likely:
            lines.append(f"  likely: {self.likely}")
        lines += self._traceback()
        lines += self._outputs() if printed else []
        if self.leftovers:
            lines.append(f"  left running and ended: {'; '.join(self.leftovers[:5])}")
        lines += [f"  artifacts: {self.artifacts}"] if printed else []
        return "\n".join(lines)

    def _others(self) -> list[str]:
        """One line a group of ranks that share a fate; the culprit is in the first line already."""
        fates = {r.rank: fate(r) for r in self.ranks if not self._is_culprit(r)}
        return [output.told_of(ranks, text) for ranks, text in output.grouped(fates)]

    def _symptom(self, cause: Cause) -> str:
        signal = self.ranks[cause.rank].signal if cause.rank is not None and cause.kind == "signal" else None
        return signal or cause.kind

    def _is_culprit(self, rank: RankResult) -> bool:
        return self.cause is not None and rank.rank == self.cause.rank and rank.state in ("failed", "crashed")

    def _traceback(self) -> list[str]:
        """The tracebacks, one for ranks that raised the same at the same line; else the stacks."""
        shown: list[str] = []
        errors = {
            r.rank: r.error for r in self.ranks if r.error and r.state == "failed" and not r.error.is_victim
        }
        alike: dict[tuple[str, str | None], list[int]] = {}
        for rank, error in errors.items():
            alike.setdefault((error.type, error.location), []).append(rank)
        for ranks in list(alike.values())[:4]:
            shown.append(f"--- {output.rank_list(ranks)}")
            shown.append(output.last_lines(errors[ranks[0]].traceback, _TRACE_LINES))
        if errors:
            return shown
        for ranks, text in output.grouped({r.rank: r.stacks for r in self.ranks if r.stacks})[:4]:
            shown += [f"--- {output.rank_list(ranks)}", output.last_lines(text, _TRACE_LINES)]
        return shown

    def _outputs(self) -> list[str]:
        shown = []
        for name in ("stdout", "stderr"):
            texts = {r.rank: shown_lines(r, name) for r in self.ranks}
            for ranks, text in output.grouped(texts)[:4]:
                same = " (the same)" if len(ranks) > 1 else ""
                shown.append(f"--- {output.rank_list(ranks)} {name}{same}")
                shown.append(text)
        return shown


def shown_lines(rank: RankResult, name: str) -> str:
    """What the text of a launch shows of a rank's ``stdout`` or ``stderr``: its last lines."""
    return output.last_lines(_without_traceback(getattr(rank, name), rank), _OUTPUT_LINES)


def _without_traceback(text: str, rank: RankResult) -> str:
    """A stream without the rank's own traceback, which is shown above; torch marks it ``[rank0]:``."""
    if rank.error is None or not rank.error.traceback:
        return text
    plain = text.replace(f"[rank{rank.rank}]: ", "")
    return plain.replace(rank.error.traceback, "") if rank.error.traceback in plain else text


def fate(rank: RankResult) -> str:
    """What became of a rank that is not the cause, in one line."""
    if rank.fate and rank.state in ("passed", "ended"):
        return rank.fate
    if rank.state == "passed":
        return "finished"
    if rank.state == "skipped":
        return f"skipped ({rank.error.message})" if rank.error else "skipped"
    if rank.state == "crashed":
        return (
            f"killed by {rank.signal}"
            if rank.signal
            else f"left with exit code {rank.exit_code} and no report"
        )
    if rank.error is not None:
        where = f"   at {rank.error.location}" if rank.error.location else ""
        as_a = "as a consequence, " if rank.error.is_victim else ""
        doing = f" {rank.fate}" if rank.fate else ""
        return f"{as_a}raised {rank.error.headline}{doing}{where}"
    where = f" at {rank.waiting_at}" if rank.waiting_at else ""
    did = "waited in a collective" if rank.in_collective else "was still running"
    return f"{did}{where}; ended by the launch"
