"""What every check is told about how to run. Imports no torch."""

from __future__ import annotations

from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import Any

from pytest_gputrain.endurance.plan import StabilityOptions, checked_iterations

DEVICES = ("cpu", "cuda")

# What starts ranks where a context names nothing: pytest's session puts its own here for each test.
SESSION_LAUNCHER: ContextVar[Any] = ContextVar("gputrain_session_launcher", default=None)

# The label of a check's launches whose ranks shared GPUs: every figure of that check carries it.
SHARED_GPU: ContextVar[str | None] = ContextVar("gputrain_shared_gpu", default=None)

# Where a pytest session with --gputrain-report keeps what the compile checks saw.
SESSION_COMPILE_REPORT: ContextVar[str | None] = ContextVar("gputrain_session_compile_report", default=None)

# Who is told of every result, with its context, as it comes: a report that is being recorded.
SESSION_RESULTS: ContextVar[Callable[[Any, CheckContext], None] | None] = ContextVar(
    "gputrain_session_results", default=None
)

# Who is told of figures beside any check, such as those of a fixture: the same report.
SESSION_FIGURES: ContextVar[Callable[[dict[str, Any]], None] | None] = ContextVar(
    "gputrain_session_figures", default=None
)

# The folder of that report, for what a check leaves beside it.
SESSION_REPORT: ContextVar[str | None] = ContextVar("gputrain_session_report", default=None)


@dataclass(frozen=True, kw_only=True)
class CheckContext:
    """device: "cpu" (gloo ranks) or "cuda"; world_size: ranks of a data-parallel launch.

    timeout: seconds one launch may take; None is the launcher's own. batch_size: samples a rank and step,
    even, because it is also split in two. launcher: what starts ranks; None is the pytest session's, with
    its options, and outside pytest the package's own. finder: what looks for a batch size, a function or
    "module:attribute" (``checks.batch_finders`` says how it is called); None is ``find_batch``.
    meter: what a loop measures its speed with, for ``compile_speed`` to judge (``checks.compile_meter`` says
    how it is called); None measures the case alone. compile_report: folder for what the compile checks saw,
    absolute. compile_backend: what the compile checks put in inductor's place; None is "aot_eager" on cpu,
    and on cuda what the case compiles with. simulated: tensor-parallel checks simulate their ranks in one
    process, and those that cannot are skipped. iterations: steps of ``stable_training``; None is up to 300
    or about a minute. stability: how that run is kept. Raises ValueError for a value that is not legal.
    """

    device: str = "cpu"
    world_size: int = 2
    timeout: float | None = None
    seed: int = 1234
    batch_size: int = 4
    launcher: Any = None
    finder: Any = None
    meter: Any = None
    compile_report: str | None = None
    compile_backend: str | None = None
    simulated: bool = False
    iterations: int | None = None
    stability: StabilityOptions | None = None

    def __post_init__(self) -> None:
        checked_iterations(self.iterations)
        if self.device not in DEVICES:
            raise ValueError(f"device is {self.device!r}; give one of {', '.join(DEVICES)}")
        if not isinstance(self.world_size, int) or self.world_size < 2:
            raise ValueError(f"world_size is {self.world_size!r}; data-parallel checks need 2 or more")
        if self.timeout is not None and not self.timeout > 0:
            raise ValueError(f"timeout is {self.timeout!r}; give seconds above 0, or None for the default")
        if self.batch_size < 2 or self.batch_size % 2:
            raise ValueError(f"batch_size is {self.batch_size!r}; give an even number, 2 or more")

        if self.compile_backend is not None and not (
            isinstance(self.compile_backend, str) and self.compile_backend.strip()
        ):
            raise ValueError(
                f"compile_backend is {self.compile_backend!r}; give a backend's name as torch.compile takes "
                "it (aot_eager, eager, inductor), or None for the default"
            )

    def for_ranks(self) -> CheckContext:
        """The same without the launcher, which stays in the process that launches."""
        return replace(self, launcher=None)
