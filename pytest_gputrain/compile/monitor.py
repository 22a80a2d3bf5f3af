"""``compile_monitor``: what torch.compile did in a block of training, and whether compiled graphs ran.

Sees what goes through dynamo: ``torch.compile``, ``model.compile()``, decorated functions, compiled autograd.
Does not see code exported ahead of time (``torch.export``, ``aot_compile``), nor TorchScript.
"""

from __future__ import annotations

import contextlib
from types import TracebackType
from typing import TYPE_CHECKING, Any

from pytest_gputrain.compile.book import Book
from pytest_gputrain.compile.records import (
    BackendError,
    CompileReport,
    Graph,
    GraphBreak,
    LimitHit,
    Moment,
    Recompile,
)

if TYPE_CHECKING:
    from typing_extensions import Self

_open: CompileMonitor | None = None


class CompileMonitor:
    """Context manager; see ``compile_monitor``. After the block it keeps what it saw."""

    def __init__(self) -> None:
        self._book = Book()
        self._stack = contextlib.ExitStack()
        self._used = False

    def __enter__(self) -> Self:
        global _open
        if self._used:
            raise RuntimeError("this compile_monitor was in use already; each block needs one of its own")
        if _open is not None:
            raise RuntimeError(
                "a compile_monitor is open already, and entering another would reset what it watches; "
                "end its block first, or use it (monitor.phase, monitor.step) instead of a second one"
            )
        from pytest_gputrain.compile import dynamo_seam, dynamo_state

        with contextlib.ExitStack() as stack:
            self._book.compiled_before = stack.enter_context(dynamo_state.restored())
            stack.enter_context(dynamo_seam.watched(self._book))
            self._stack = stack.pop_all()
        self._used, _open = True, self
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        global _open
        _open = None
        self._book.ended_with(error)
        self._stack.close()

    def step(self, number: int, phase: str | None = None) -> None:
        """What follows belongs to step ``number`` (of ``phase``, where given)."""
        moment = Moment(self._book.moment.phase if phase is None else phase, number)
        self._book.turn(moment, expected=True)

    def phase(self, name: str) -> None:
        """What follows belongs to phase ``name``, such as "eval", at the same step."""
        self._book.turn(Moment(name, self._book.moment.step), expected=False)

    @property
    def graphs(self) -> list[Graph]:
        """The graphs that were compiled, in order."""
        return list(self._book.graphs)

    @property
    def recompiles(self) -> list[Recompile]:
        """Code that was compiled again, with dynamo's reason."""
        return list(self._book.recompiles)

    @property
    def breaks(self) -> list[GraphBreak]:
        """Lines that are in no graph."""
        return list(self._book.breaks)

    @property
    def limit_hits(self) -> list[LimitHit]:
        """Code that torch runs eager since it was compiled too often."""
        return list(self._book.limit_hits)

    @property
    def suppressed(self) -> list[BackendError]:
        """Compilations that failed while the loop went on."""
        return self._book.suppressed

    @property
    def graph_runs(self) -> int:
        """How many times a compiled graph ran (its forward; a backward is counted with it)."""
        return self._book.graph_runs

    @property
    def graph_runs_by_step(self) -> dict[int | None, int]:
        """The same by number of the step, the phases together."""
        return self.report().graph_runs_by_step

    @property
    def cache_hits(self) -> int:
        """How many graphs came from inductor's or AOTAutograd's cache."""
        return self.report().cache_hits

    @property
    def compile_seconds(self) -> float:
        """Seconds spent compiling: capture, backend, guards, and backwards compiled when first run."""
        return self.report().compile_seconds

    @property
    def compile_seconds_by_step(self) -> dict[int | None, float]:
        """The same by number of the step, the phases together."""
        return self.report().compile_seconds_by_step

    def report(self) -> CompileReport:
        """What was seen until now, as plain data."""
        return self._book.report()

    def is_compiled(self, after_step: int | None = None) -> bool:
        """Whether compiled graphs ran, and nothing fell back to eager; see ``CompileReport.is_compiled``."""
        return self.report().is_compiled(after_step)

    def __str__(self) -> str:
        return str(self.report())


def compile_monitor() -> CompileMonitor:
    """A context manager that tells what torch.compile does in its block.

    ``with compile_monitor() as m:`` resets dynamo, so that everything is compiled within the block and seen,
    and again afterwards; dynamo's, inductor's and functorch's configuration, the environment variables that
    torch reads, the stance, callbacks and log levels are then as they were before.
    ``m.step(3, "train")`` says where the loop is.
    One at a time in a process: a second one raises RuntimeError.
    Raises MonitorUnavailable (a RuntimeError) where this torch lacks what it stands on.
    """
    return CompileMonitor()


def open_monitor() -> Any:
    """The monitor whose block runs in this process, or None."""
    return _open
