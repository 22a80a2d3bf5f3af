"""``oom_guard``: a block of training under a memory limit; its peak, what that was for, and what is left.

On the CPU tensors are accounted for, and the operation that goes over the limit raises: real training steps
hit a real out-of-memory on any machine. On CUDA the allocator itself refuses.
"""

from __future__ import annotations

import copy
import gc
from contextlib import AbstractContextManager
from types import TracebackType
from typing import Any

import torch

from pytest_gputrain.memory import categories
from pytest_gputrain.memory.capacity import known_device
from pytest_gputrain.memory.clean import release
from pytest_gputrain.memory.errors import OutOfMemory, translated
from pytest_gputrain.memory.large import Large
from pytest_gputrain.memory.ledger import Record
from pytest_gputrain.memory.left import Left, what_is_left
from pytest_gputrain.memory.lines import without_ours
from pytest_gputrain.memory.meter import meter_of
from pytest_gputrain.memory.oom import is_oom
from pytest_gputrain.values import format_size, parse_limit

# Of the largest tensors, as many as a person reads.
_LARGEST, _SHOWN = 10, 3
# Finding out who holds something takes a second: not worth it for a loss that was kept.
_WORTH_TELLING = 2**20


class OomGuard:
    """``with OomGuard("40GB") as guard:``, then ``guard.peak_bytes``, ``.by_category``, ``.leaks``.

    ``device``: the CPU, or the current CUDA device where CUDA is in use already. ``roots``: a module or
    an optimizer, or a list of them, whose memory counts from the beginning; others count from when they are
    first used.

    An out-of-memory of any form leaves the block as ``OutOfMemory``, after what the block made was freed.
    Raises ``ValueError`` for a limit or a device that makes no sense, ``OutOfMemory`` when the limit is below
    what is in use already.
    """

    def __init__(
        self,
        limit: int | str | None = None,
        device: str | torch.device | None = None,
        *,
        roots: Any = (),
    ) -> None:
        __tracebackhide__ = True
        self.limit = None if limit is None else parse_limit(limit)
        self.oom: OutOfMemory | None = None
        self._given = device
        alone = isinstance(roots, torch.nn.Module) or hasattr(roots, "param_groups")
        self._roots = (roots,) if alone else tuple(roots)
        self._meter = meter_of(self.limit, self._default_device() if device is None else known_device(device))
        self._is_active = False
        self._no_verdict = "the block has not run yet"
        self._peak: tuple[int, dict[str, int], tuple[Large, ...]] | None = None

    def __enter__(self) -> OomGuard:
        if self._is_active:
            raise RuntimeError(
                "this oom_guard is in use already; a block within its block needs one of its own"
            )
        self._meter = meter_of(self.limit, self._meter.device)
        self.oom, self._no_verdict, self._peak = None, "the block has not ended yet", None
        try:
            self._meter.start(self._roots)
        except OutOfMemory as error:
            self.oom = copy.copy(error)
            raise
        self._is_active = True
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._is_active = False
        ran_out = error is not None and is_oom(error)
        raised = self._translated(error) if error is not None and ran_out else None
        self._meter.stop(drop_gradients=ran_out)
        largest = sorted(self._meter.at_peak(), key=lambda record: -record.num_bytes)[:_LARGEST]
        self._peak = (
            self._meter.peak_bytes,
            self._meter.by_category_at_peak(),
            tuple(Large.of(record) for record in largest),
        )
        if error is not None and not ran_out:
            self._no_verdict = f"the block ended with {type(error).__name__}"
            return
        self._no_verdict = ""
        if raised is None:
            self._check_device()
            return
        release(error)
        # Without its traceback, which would keep the frames of the test alive as long as this guard.
        self.oom = copy.copy(raised)
        if self._num_bytes_left() >= _WORTH_TELLING and hasattr(raised, "add_note"):  # Python 3.11
            raised.add_note("still held: " + "; ".join(str(left) for left in self.left[:_SHOWN]))
        if raised is not error:
            raise raised from error
        error.__traceback__ = without_ours(error.__traceback__)

    @property
    def device(self) -> torch.device:
        """What is measured and limited."""
        return self._meter.device

    @property
    def peak_bytes(self) -> int:
        """The most that was in use at once, in bytes; what was refused does not count."""
        return self._peak[0] if self._peak else self._meter.peak_bytes

    def note_every_line(self) -> None:
        """From now on, on the CPU, also who makes a small tensor is written down, which is slow."""
        self._meter.note_every_line()

    def uncounted(self) -> AbstractContextManager[None]:
        """Around the loading of data: on the CPU a tensor made meanwhile counts once training uses it.

        What it is made of, a data set say, then does not count, however much of that is in memory.
        """
        return self._meter.uncounted()

    @property
    def in_use(self) -> int:
        """What is in use now, in bytes."""
        return self._meter.in_use

    @property
    def made_bytes(self) -> int:
        """What was made in the block and is in use now, in bytes."""
        return self._meter.made_bytes

    @property
    def by_category(self) -> dict[str, int]:
        """What the peak was for, in bytes by category."""
        return dict(self._peak[1]) if self._peak else self._meter.by_category_at_peak()

    @property
    def largest(self) -> tuple[Large, ...]:
        """The largest tensors that were alive at the peak, after the block."""
        return self._peak[2] if self._peak else ()

    @property
    def left(self) -> tuple[Left, ...]:
        """All that the block made and that is alive now; parameters and optimizers in use do not count.

        Raises RuntimeError where there is no verdict: before the end, or when another error ended the block.
        """
        return self.left_in()

    def left_in(self, **known: Any) -> tuple[Left, ...]:
        """As ``left``, looking for holders in these objects, too: ``left_in(model=model)``.

        For a caller inside of this package, whose own variables are not looked at.
        """
        if self._no_verdict:
            raise RuntimeError(f"oom_guard cannot tell what is left: {self._no_verdict}")
        gc.collect()
        return what_is_left(self._passing(), known)

    @property
    def leaks(self) -> tuple[Left, ...]:
        """What is left without being in hand: held by more than a local variable of a running function."""
        return tuple(left for left in self.left if not left.in_hand)

    @property
    def swallowed(self) -> OutOfMemory | None:
        """On the CPU: the last out-of-memory that the block itself caught, to go on without it."""
        return None if self.oom is not None else self._meter.refused

    @property
    def notes(self) -> tuple[str, ...]:
        """What these figures do not show, in words."""
        notes = self._meter.notes()
        if (error := self.swallowed) is not None:
            notes = [*notes, f"the block caught an out-of-memory and went on: {error}"]
        return tuple(notes)

    def assert_nothing_left(self) -> None:
        """Raises AssertionError that names what the block leaked, the line that made it and who holds it."""
        __tracebackhide__ = True
        if leaks := self.leaks:
            total = format_size(sum(leak.num_bytes for leak in leaks))
            raise AssertionError(
                f"{total} left behind:\n" + "\n".join(f"  {leak}" for leak in leaks[:_LARGEST])
            )

    def figures(self) -> str:
        """A few lines for people: peak, categories, the largest tensors, notes; empty before the end."""
        if self._peak is None:
            return ""
        limit = f", limit {format_size(self.limit)}" if self.limit else ""
        head = f"peak {format_size(self.peak_bytes)} on {self.device}{limit}"
        lines = [f"{head}: {categories.describe(self.by_category)}"]
        lines += [f"  {large}" for large in self.largest[:_SHOWN]]
        return "\n".join([*lines, *(f"  note: {note}" for note in self.notes)])

    def _passing(self) -> list[Record]:
        """What should be gone; gradients and optimizer state stay with their parameters."""
        stay = (categories.GRADIENTS, categories.OPTIMIZER_STATE)
        return [record for record in self._meter.made_here() if record.category not in stay]

    def _num_bytes_left(self) -> int:
        return sum(record.num_bytes for record in self._passing())

    def _default_device(self) -> torch.device:
        # Asking CUDA for more than whether it is in use would begin to use it.
        return known_device("cuda") if torch.cuda.is_initialized() else torch.device("cpu")

    def _check_device(self) -> None:
        if self._given is None and (strangers := self._meter.strangers()):
            raise RuntimeError(
                f"oom_guard measured {self.device}, but the block used {', '.join(sorted(strangers))}: "
                f"say which is meant with device="
            )

    def _translated(self, error: BaseException) -> OutOfMemory:
        if isinstance(error, OutOfMemory):
            return error
        meter = self._meter
        return translated(error, meter.in_use, self.limit, str(meter.device), meter.by_category())
