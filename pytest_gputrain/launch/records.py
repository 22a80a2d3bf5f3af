"""What a launch is made of, as plain data: verdict, cause, and what became of each rank.

Imports nothing of the package and no torch: these records are read by the pytest process, by the
verdict (pure) and by reports.
"""

from __future__ import annotations

import enum
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

RankOutcome = Literal["passed", "failed", "crashed", "skipped", "ended"]


class Verdict(enum.Enum):
    """What a launch came to. Only PASSED is green."""

    PASSED = "PASSED"
    """Every rank positively reported success."""
    FAILED = "FAILED"
    """A rank raised, called ``sys.exit``, or skipped while another ran."""
    CRASHED = "CRASHED"
    """A rank's process ended without a report: a signal, or an exit behind Python's back."""
    HUNG = "HUNG"
    """Nothing moves any more: ranks wait for what cannot come."""
    TIMED_OUT = "TIMED_OUT"
    """The deadline came while ranks still made progress."""
    SKIPPED = "SKIPPED"
    """Every rank skipped, or the hardware is missing."""

    def __str__(self) -> str:
        return self.value


@dataclass(frozen=True)
class Cause:
    """The first thing that went wrong. ``str(cause)`` is the line a user reads first.

    ``rank`` is None when no single rank is to blame; ``location`` is ``file:line in function`` in the
    user's code where it is known.
    """

    rank: int | None
    kind: str
    message: str
    location: str | None = None

    def __str__(self) -> str:
        return f"{self.message}   at {self.location}" if self.location else self.message


# What a rank prints because *another* rank went away. Seen on gloo, NCCL and TCPStore (torch 2.6 to 2.13).
# The rank that shows one of these is a victim: look at the others for the cause.
_VICTIM = re.compile(
    r"Connection closed by peer|Connection reset by peer|Connection refused|Broken pipe|Socket closed"
    r"|communicator was aborted|remote process exited|failed to recv, got 0 bytes|recvValue failed"
    r"|sendBytes failed|Connection was likely closed|peer closed|Socket Timeout|application level timeout",
    re.IGNORECASE,
)
# A wait that ran into the process group's own timeout is the hang itself, seen from a waiting rank.
_WAITED = re.compile(
    r"Timed out waiting|wait timeout after|Watchdog caught collective operation timeout"
    r"|monitoredBarrier|Timeout waiting for key",
    re.IGNORECASE,
)
# What DistributedDataParallel says of a parameter without a gradient: a paragraph of guesses, then which they
# are, by name (TORCH_DISTRIBUTED_DEBUG=INFO, which ranks have unless the user sets another) or by number.
_UNREDUCED = "Expected to have finished reduction in the prior iteration"
_NAMES = re.compile(r"Parameters which did not receive grad for rank \d+: (.+)")
_NUMBERS = re.compile(r"Parameter indices which did not receive grad for rank \d+: ([\d ]+)")
_SHOWN = 4
# What torch raises in the place of an exception in a data loader's worker: its traceback there is the text.
_OF_WORKER = re.compile(r"Caught \S+ in (DataLoader worker process \d+)\.\s+Original Traceback")
_RAISED = re.compile(r"^[A-Za-z_][\w.]*(: .*)?$", re.MULTILINE)


def without_gradient(names: Sequence[str]) -> str:
    """``no gradient in the last step for a.weight, a.bias (DDP waited for them)``"""
    names = list(names)
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    waited = "it" if len(names) == 1 else "them"
    return f"no gradient in the last step for {', '.join(names[:_SHOWN])}{more} (DDP waited for {waited})"


def _unreduced(message: str) -> str | None:
    """Of DDP's error the part that says what is the matter; None for any other."""
    if not message.lstrip().startswith(_UNREDUCED):
        return None
    if (found := _NAMES.search(message)) is not None:
        return without_gradient([name.strip() for name in found[1].split(",")])
    if (found := _NUMBERS.search(message)) is not None:
        return without_gradient([f"parameter {number}" for number in found[1].split()])
    return None


def is_of_worker(message: str) -> bool:
    """Whether it is what torch says of an exception in a data loader's worker."""
    return _OF_WORKER.match(message.lstrip()) is not None


def _in_worker(message: str) -> str | None:
    """``KeyError: 'label' (in DataLoader worker process 1)``; None for any other error."""
    if (found := _OF_WORKER.match(message.lstrip())) is None:
        return None
    *_, last = [one[0] for one in _RAISED.finditer(message)] or ["an exception"]
    return f"{last} (in {found[1]})"


@dataclass(frozen=True)
class RankError:
    """An exception on a rank, as text: it crosses processes even when it cannot be pickled."""

    type: str
    message: str
    traceback: str
    location: str | None = None

    @property
    def headline(self) -> str:
        """``ValueError: boom``, one line, at most 300 characters; of another rank's death just its name."""
        if (echo := _VICTIM.search(self.message)) is not None:
            return f"{self.type}: {echo[0]}"
        if (unreduced := _unreduced(self.message)) is not None:
            return f"{self.type}: {unreduced}"
        lines = self.message.strip().splitlines()
        text = _in_worker(self.message) or (f"{self.type}: {lines[0]}" if lines else self.type)
        return text if len(text) <= 300 else text[:297] + "..."

    @property
    def is_victim(self) -> bool:
        """Whether this is what a rank shows when another one went away."""
        return _VICTIM.search(f"{self.type}: {self.message}") is not None

    @property
    def is_wait_timeout(self) -> bool:
        """Whether the process group's own timeout ended a wait: a hang, seen from a waiting rank."""
        return _WAITED.search(self.message) is not None


@dataclass
class RankResult:
    """What became of one rank.

    ``state`` is ``ended`` for a rank that was still running when the launch was ended. ``exit_code`` is
    the process's own (negative never: a signal is in ``signal`` by name, such as ``"SIGKILL"``).
    ``stdout`` and ``stderr`` hold at most the first and last 128 KiB; the files are under
    ``LaunchResult.artifacts``. ``stacks`` is filled for ranks that were still running at the end.
    ``attached`` is what whoever ran the function on the rank attached to its exception.
    ``fate`` says in a line what the rank waits for or how far it came, where a hang was looked into.
    ``peak_bytes`` is the most memory that it held (``peak.py``), of a rank that reported.
    ``node`` and ``host`` say on which machine it ran, where a launch had several.
    """

    rank: int
    state: RankOutcome
    value: Any = None
    error: RankError | None = None
    exit_code: int | None = None
    signal: str | None = None
    stdout: str = ""
    stderr: str = ""
    stacks: str = ""
    waiting_at: str | None = None
    in_collective: bool = False
    moving: bool = False
    fate: str = ""
    pid: int | None = None
    seconds: float = 0.0
    leftovers: list[str] = field(default_factory=list)
    attached: bytes = b""
    node: int = 0
    host: str | None = None
    peak_bytes: int | None = None

    @property
    def output(self) -> str:
        """Standard output followed by standard error."""
        return self.stdout + self.stderr
