"""What a compile monitor tells: plain data that goes through pickle from a rank and into JSON.

A location is ``file:line in function``, the file relative to the working directory if it is below it.
``step`` is None before the first call of ``monitor.step``; ``phase`` is "train" until told otherwise.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple


class Moment(NamedTuple):
    """Where the loop is: ``step`` of ``phase``."""

    phase: str = "train"
    step: int | None = None

    def __str__(self) -> str:
        return self.phase if self.step is None else f"{self.phase} step {self.step}"


@dataclass(frozen=True, kw_only=True)
class Graph:
    """One graph that dynamo captured and a backend compiled.

    compile_id: dynamo's, ``frame/compilation``: ``0/2`` is the third compilation of frame 0.
    function, location: the code it was captured from, and its first line.
    seconds: of capturing and compiling it, the backward too where it is compiled along.
    ops: operations in the captured graph. dynamic_dims: such as ``L['x'].size()[0]``, a size or a number that
    is no constant of the graph.
    parameters: how many of its inputs are parameters; 0 is a graph of a loss, say, and of no model.
    buckets: into how many graphs DDPOptimizer has split it, 1 without.
    cached: whether the backend took it from a cache (inductor's FX graph cache, AOTAutograd's).
    """

    compile_id: str
    function: str
    location: str
    step: int | None
    phase: str
    seconds: float
    ops: int
    backend: str
    dynamic_dims: tuple[str, ...] = ()
    parameters: int = 0
    buckets: int = 1
    cached: bool = False


@dataclass(frozen=True, kw_only=True)
class Recompile:
    """Code that was compiled already was compiled again.

    reason: in dynamo's words, the guard that failed. reasons: of each of the earlier compilations.
    location: the user's line that the guard is about where dynamo says it, else the function's first line.
    called_from: the user's line that called the compiled code.
    number: 1 is the first recompile of this code.
    in_torch: the code is torch's own, or the standard library's.
    """

    compile_id: str
    function: str
    location: str
    called_from: str | None
    reason: str
    reasons: tuple[str, ...]
    step: int | None
    phase: str
    number: int
    in_torch: bool = False


@dataclass(frozen=True, kw_only=True)
class GraphBreak:
    """A line that dynamo could not put into the graph: Python runs it, between two graphs.

    location: the innermost line outside of torch and the standard library.
    skipped: the whole function stays uncompiled: nothing can be resumed there (within a ``with``, say).
    in_torch: the line of the break is torch's own, as in DistributedDataParallel's forward.
    """

    compile_id: str
    function: str
    location: str
    reason: str
    step: int | None
    phase: str
    skipped: bool = False
    in_torch: bool = False


@dataclass(frozen=True, kw_only=True)
class LimitHit:
    """Dynamo gave this code up: from now on what fits none of its graphs runs eager, without a word.

    kind: ``recompile_limit`` or ``accumulated_recompile_limit``; limit: its value.
    reason: of the last recompile asked for. location: as a recompile's.
    raised: with ``fullgraph`` or ``fail_on_recompile_limit_hit`` dynamo raises instead.
    """

    function: str
    location: str
    kind: str
    limit: int
    reason: str
    step: int | None
    phase: str
    raised: bool = False


@dataclass(frozen=True, kw_only=True)
class BackendError:
    """A compilation that failed while the loop went on.

    swallowed_by: "torch" (``suppress_errors``, or a backend's exception that torch falls back on), or
    "the program", which caught what ``torch.compile`` raised.
    """

    function: str
    location: str
    message: str
    swallowed_by: str
    step: int | None
    phase: str


@dataclass(frozen=True, kw_only=True)
class StepFigures:
    """graph_runs: how many compiled graphs ran; compile_seconds: spent compiling."""

    step: int | None
    phase: str
    graph_runs: int = 0
    compile_seconds: float = 0.0


@dataclass(frozen=True, kw_only=True)
class CompileReport:
    """All that a monitor saw. ``str()`` is the summary, whose first line is the verdict.

    steps: every step that was told and everything in which a graph ran or was compiled, in order.
    notes: what this torch does not tell.
    """

    graphs: tuple[Graph, ...] = ()
    recompiles: tuple[Recompile, ...] = ()
    breaks: tuple[GraphBreak, ...] = ()
    limit_hits: tuple[LimitHit, ...] = ()
    suppressed: tuple[BackendError, ...] = ()
    steps: tuple[StepFigures, ...] = ()
    cache_hits: int = 0
    compile_seconds: float = 0.0
    compiled_before: int = 0
    torch: str = ""
    notes: tuple[str, ...] = field(default=())

    @property
    def graph_runs(self) -> int:
        """How many times a compiled graph ran."""
        return sum(figures.graph_runs for figures in self.steps)

    @property
    def graph_runs_by_step(self) -> dict[int | None, int]:
        """The same by number of the step, the phases together."""
        runs: dict[int | None, int] = {}
        for figures in self.steps:
            runs[figures.step] = runs.get(figures.step, 0) + figures.graph_runs
        return runs

    @property
    def compile_seconds_by_step(self) -> dict[int | None, float]:
        """Seconds spent compiling, by number of the step, the phases together."""
        seconds: dict[int | None, float] = {}
        for figures in self.steps:
            seconds[figures.step] = seconds.get(figures.step, 0.0) + figures.compile_seconds
        return seconds

    def is_compiled(self, after_step: int | None = None) -> bool:
        """Whether compiled graphs ran, and nothing fell back to eager without a word.

        With steps told, a graph must have run in every step of phase "train" (of any phase, where none of
        that name was told). after_step: only later steps count.
        """
        if self.limit_hits or self.suppressed:
            return False
        return not self.eager_steps(after_step) and any(
            figures.graph_runs for figures in self.steps if _is_after(figures, after_step)
        )

    def eager_steps(self, after_step: int | None = None) -> list[int]:
        """The steps of training in which no compiled graph ran."""
        told = [f for f in self.steps if f.step is not None and _is_after(f, after_step)]
        train = [f for f in told if f.phase == "train"] or told
        return [f.step for f in train if f.step is not None and not f.graph_runs]

    def as_json(self) -> dict[str, Any]:
        """Plain values, with the answers beside what was recorded."""
        answers = {"is_compiled": self.is_compiled(), "graph_runs": self.graph_runs}
        return {**answers, **asdict(self)}

    def to_json(self) -> str:
        """``as_json`` as text."""
        return json.dumps(self.as_json(), indent=2)

    def summary(self) -> str:
        """Several lines, the verdict first."""
        from pytest_gputrain.compile.summary import summary

        return summary(self)

    def __str__(self) -> str:
        return self.summary()


def _is_after(figures: StepFigures, after_step: int | None) -> bool:
    return after_step is None or (figures.step is not None and figures.step > after_step)
