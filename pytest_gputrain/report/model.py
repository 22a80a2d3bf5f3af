"""What a report holds: ``report.json`` as frozen dataclasses. Imports no torch and no pytest.

The JSON is these classes field by field (``report/codec.py``), and its schema, published as
``report/schema/report-1.json``, is made from them (``report/schema.py``). Who writes a report may leave out
what has a default here; who reads one ignores names it does not know, so that fields can be added without
another version. Paths are relative to the report's folder. Times are seconds, sizes bytes,
moments text in ISO 8601 in UTC. Numbers are finite: what is not is null in a series and text in figures.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from pytest_gputrain.report.reading import SCHEMA, VERSION

MOST_POINTS = 500  # of a series: more are not seen on a screen
MOST_BARS = 600  # of a timeline, over all its ranks

ReportVerdict = Literal["passed", "failed", "nothing_ran", "interrupted", "incomplete"]
Ending = Literal["finished", "interrupted", "worker_died", "killed"]
TestOutcome = Literal["passed", "failed", "skipped", "error", "crashed"]
Kind = Literal["check", "launch", "stability", "test"]
Better = Literal["higher", "lower", "equal"]
Plot = Literal[
    "loss",
    "step_seconds",
    "tokens_per_second",
    "mfu",
    "memory",
    "ladder",
    "recompiles",
    "tp_gradient_error",
]


@dataclass(frozen=True)
class Session:
    """One run of pytest or of ``gputrain check``; of a merged report, all of them together.

    complete: every test that was collected has an outcome, and no record is missing or cut off.
    ending: ``worker_died`` when a process of the session ended without a word and another went on;
    ``killed`` when the session itself did. reason: why it was interrupted. notes: what a reader must know.
    """

    id: str
    started: str
    ended: str | None
    seconds: float
    complete: bool
    ending: Ending
    exit_code: int | None = None
    reason: str | None = None
    command: tuple[str, ...] = ()
    workers: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Gpu:
    """A GPU that the session might use. memory_bytes: 0 where the driver does not tell."""

    name: str
    memory_bytes: int


@dataclass(frozen=True)
class Machine:
    """Where figures were measured. gpu_origin: who says which GPUs there are.

    commit, dirty: of the user's repository, null outside of one. label: hardware, torch and commit in a line.
    """

    host: str
    os: str
    python: str
    torch: str | None
    pytest_gputrain: str | None
    cpu: str
    cores: int
    memory_bytes: int
    gpus: tuple[Gpu, ...]
    gpu_origin: str
    label: str
    commit: str | None = None
    dirty: bool | None = None


@dataclass(frozen=True)
class Totals:
    """Tests by outcome. seconds: of all tests together, whatever ran beside what."""

    passed: int = 0
    failed: int = 0
    skipped: int = 0
    error: int = 0
    crashed: int = 0
    seconds: float = 0.0

    @property
    def bad(self) -> int:
        return self.failed + self.error + self.crashed


@dataclass(frozen=True)
class NotRun:
    """Tests that did not run, by reason; ``tests`` names the first of them."""

    reason: str
    count: int
    tests: tuple[str, ...] = ()


@dataclass(frozen=True)
class Metric:
    """A figure to compare from night to night. spread: robust sigma of ``value``, in its unit."""

    value: float
    unit: str
    better: Better
    spread: float | None = None
    samples: int = 1


@dataclass(frozen=True)
class Series:
    """A line of a plot; ``y`` is null where there is no finite value.

    limit: what ``y`` has to stay below, drawn across (a memory budget, a tolerance), and limit_label what it
    is. names: of the places on the x axis that are no numbers (layers), one for each ``x``.
    """

    plot: Plot
    label: str
    unit: str
    x: tuple[float, ...]
    y: tuple[float | None, ...]
    limit: float | None = None
    limit_label: str = ""
    names: tuple[str, ...] = ()


@dataclass(frozen=True)
class Cause:
    """The first thing that went wrong in a launch. location: ``file:line in function``."""

    rank: int | None
    kind: str
    message: str
    location: str | None = None


@dataclass(frozen=True)
class Rank:
    """What became of a rank. last: how far it came or what it waits for; stack: or its traceback.

    peak_bytes: by torch's allocator on a GPU; without one, of the process, where no call before it counts in.
    """

    rank: int
    outcome: str
    seconds: float
    peak_bytes: int | None = None
    host: str | None = None
    last: str | None = None
    stack: str | None = None
    log_tail: str | None = None


@dataclass(frozen=True)
class Launch:
    """A launch of ranks. Of one that passed there are no stacks, logs, artifacts and timeline.

    timeline: the last collectives of its ranks as Chrome trace events; all of them are among the artifacts.
    """

    verdict: str
    seconds: float
    cause: Cause | None = None
    likely: str | None = None
    ranks: tuple[Rank, ...] = ()
    artifacts: str | None = None
    timeline: tuple[Mapping[str, Any], ...] | None = None


@dataclass(frozen=True)
class Test:
    """A test, or a check from the command line. message: whole, its first line is the cause.

    machine: index into the report's machines. labels: what keeps its figures from counting as measured on
    the hardware named: ``simulated``, ``shared GPU``, ``pretended GPUs``; ``expected failure`` and such.
    launches_left_out: how many more launches it made than are listed.
    """

    __test__ = False  # pytest would collect it

    id: str
    kind: Kind
    outcome: TestOutcome
    message: str = ""
    seconds: float = 0.0
    case: str | None = None
    check: str | None = None
    device: str | None = None
    machine: int = 0
    worker: str | None = None
    labels: tuple[str, ...] = ()
    figures: Mapping[str, Any] = field(default_factory=dict)
    metrics: Mapping[str, Metric] = field(default_factory=dict)
    series: tuple[Series, ...] = ()
    launches: tuple[Launch, ...] = ()
    launches_left_out: int = 0

    @property
    def headline(self) -> str:
        """The first line of the message."""
        return self.message.strip().partition("\n")[0]


@dataclass(frozen=True)
class File:
    """Something else in the report's folder."""

    title: str
    path: str


@dataclass(frozen=True)
class Report:
    """A whole report. Only ``verdict == "passed"`` is green."""

    verdict: ReportVerdict
    session: Session
    machines: tuple[Machine, ...]
    totals: Totals
    tests: tuple[Test, ...]
    not_run: tuple[NotRun, ...] = ()
    files: tuple[File, ...] = ()
    schema: str = SCHEMA
    version: int = VERSION
