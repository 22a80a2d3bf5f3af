"""Where a monitor writes down what dynamo does, under the step in which it does it."""

from __future__ import annotations

import threading
import weakref
from dataclasses import replace

from pytest_gputrain.compile.records import (
    BackendError,
    CompileReport,
    Graph,
    GraphBreak,
    LimitHit,
    Moment,
    Recompile,
    StepFigures,
)


class Book:
    """Records of one monitor. Dynamo compiles under a lock of its own; graphs run in any thread."""

    def __init__(self) -> None:
        self.moment = Moment()
        self.graphs: list[Graph] = []
        self.recompiles: list[Recompile] = []
        self.breaks: list[GraphBreak] = []
        self.limit_hits: list[LimitHit] = []
        self.notes: list[str] = []
        self.compiled_before = 0
        self.torch = ""
        self._swallowed: list[BackendError] = []
        self._raised: list[tuple[weakref.ref[BaseException], BackendError]] = []
        self._runs: dict[Moment, int] = {}
        self._seconds: dict[Moment, float] = {}
        self._lock = threading.Lock()

    def turn(self, moment: Moment, *, expected: bool) -> None:
        """What follows belongs to this moment. expected: it is one even if no graph runs in it."""
        with self._lock:
            self.moment = moment
            if expected:
                self._runs.setdefault(moment, 0)

    def ran(self) -> None:
        """A compiled graph runs. In the middle of every step: the only thing here that must be quick."""
        with self._lock:
            self._runs[self.moment] = self._runs.get(self.moment, 0) + 1

    @property
    def graph_runs(self) -> int:
        """How many times a compiled graph ran. Asked for in every step, by some."""
        with self._lock:
            return sum(self._runs.values())

    def compiled_for(self, seconds: float, moment: Moment) -> None:
        """So many seconds were spent compiling."""
        with self._lock:
            self._runs.setdefault(moment, 0)
            self._seconds[moment] = self._seconds.get(moment, 0.0) + seconds

    def add_break(self, found: GraphBreak) -> None:
        """A graph break; dynamo, which traces a function again after each of them, may tell one twice."""
        if found not in self.breaks:
            self.breaks.append(found)

    def note(self, text: str) -> None:
        """Something that the figures do not show, once."""
        if text not in self.notes:
            self.notes.append(text)

    def skipped(self, compile_id: str, location: str | None = None) -> bool:
        """The function whose break (at ``location``) was told last stays uncompiled as a whole.

        False where none was told.
        """
        for index in reversed(range(len(self.breaks))):
            found = self.breaks[index]
            if found.compile_id == compile_id and location in (None, found.location):
                self.breaks[index] = replace(found, skipped=True)
                return True
        return False

    def raised(self, error: BaseException, record: BackendError) -> None:
        """A compilation failed and raises; who catches it decides what that is.

        Only a weak reference: the error's traceback holds the loop's variables.
        """
        self._raised.append((weakref.ref(error), record))

    def take_raised(self, error: BaseException) -> BackendError | None:
        """The record of an error, which is no longer open."""
        for index, (known, record) in enumerate(self._raised):
            if known() is error:
                del self._raised[index]
                return record
        return None

    def swallowed(self, record: BackendError) -> None:
        """torch caught the error and runs the code eager."""
        self._swallowed.append(replace(record, swallowed_by="torch"))

    def ended_with(self, error: BaseException | None) -> None:
        """The block ended with this exception: what it was raised from was not swallowed."""
        seen: set[int] = set()
        while error is not None and id(error) not in seen:
            seen.add(id(error))
            self.take_raised(error)
            error = error.__cause__ or error.__context__

    @property
    def suppressed(self) -> list[BackendError]:
        """Failed compilations that the loop went on after."""
        return [*self._swallowed, *(record for _, record in self._raised)]

    def report(self) -> CompileReport:
        """All of it, as it is now."""
        with self._lock:
            steps = tuple(
                StepFigures(
                    step=moment.step,
                    phase=moment.phase,
                    graph_runs=runs,
                    compile_seconds=self._seconds.get(moment, 0.0),
                )
                for moment, runs in self._runs.items()
            )
        return CompileReport(
            graphs=tuple(self.graphs),
            recompiles=tuple(self.recompiles),
            breaks=tuple(self.breaks),
            limit_hits=tuple(self.limit_hits),
            suppressed=tuple(self.suppressed),
            steps=steps,
            cache_hits=sum(graph.cached for graph in self.graphs),
            compile_seconds=sum(figures.compile_seconds for figures in steps),
            compiled_before=self.compiled_before,
            torch=self.torch,
            notes=tuple(self.notes),
        )
