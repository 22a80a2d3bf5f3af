"""Which windows the accumulation checks try: how many samples, in how many pieces, and what each counts."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pytest_gputrain.case import TrainingCase, pytree
from pytest_gputrain.case.loading import describe
from pytest_gputrain.checks.accumulation_lab import Lab
from pytest_gputrain.checks.accumulation_window import Gradients
from pytest_gputrain.checks.batch_reading import read
from pytest_gputrain.checks.result import CheckFailed, CheckSkipped

# Divisible by every number of pieces: a piece that is smaller than the others is a trial of its own.
# Four first: with two, a first one that is lost and a last one that counts alone are the same.
SAMPLES, FEW_SAMPLES = 24, 8
PIECES: tuple[int, ...] = (4, 2, 3, 8)
FEW_PIECES: tuple[int, ...] = (4, 2)
SLOW_PIECES: tuple[int, ...] = (2,)
# Above so many seconds for a step on ctx.batch_size samples, fewer have to do.
QUICK, SLOW = 0.03, 1.0
RETRIES = 8


@dataclass(frozen=True)
class Trial:
    """One window. even: all pieces have as many samples; is_split: together they are the full batch."""

    parts: list[Any]
    even: bool
    is_split: bool

    @property
    def num(self) -> int:
        return len(self.parts)


@dataclass(frozen=True)
class Plan:
    """requested: the size that ``full`` was drawn with; num_samples: what it has."""

    full: Any
    requested: int
    num_samples: int
    trials: list[Trial]
    notes: list[str]


def plan(case: TrainingCase, lab: Lab, size: int) -> Plan:
    """Raises CheckSkipped where the batch cannot be split, CheckFailed where splitting loses samples."""
    seconds = min(_seconds(lab, size) for _ in range(2))  # the first pass makes caches
    for _ in range(RETRIES):  # on a busy machine a quick step takes long now and then
        if not QUICK < seconds < RETRIES * QUICK:
            break
        seconds = min(seconds, _seconds(lab, size))
    wanted, pieces = SAMPLES, PIECES
    if seconds > QUICK:
        wanted, pieces = (FEW_SAMPLES, FEW_PIECES) if seconds < SLOW else (size, SLOW_PIECES)
    full = lab.batch(wanted)
    length = pytree.batch_length(full) or wanted
    trials: list[Trial] = []
    notes: list[str] = []
    for num in [n for n in pieces if n <= length] or [2]:
        try:
            parts = list(case.split(full, num))
        except Exception as error:
            notes.append(f"no window of {num} micro-batches: split raised {describe(error)}")
            continue
        if len(parts) != num:
            notes.append(f"no window of {num} micro-batches: split gave {len(parts)}")
            continue
        _judge_split(full, parts)
        if problem := _too_small(lab, parts):
            notes.append(f"no window of {num} micro-batches: {problem}")
            continue
        trials.append(Trial(parts, len({pytree.batch_length(part) for part in parts}) == 1, True))
    if not trials:
        raise CheckSkipped(f"no batch could be split: {notes[0]}")
    trials += _ragged(case, lab, trials[0])
    return Plan(full, wanted, length, trials, notes)


def _seconds(lab: Lab, size: int) -> float:
    """Of a step on one micro-batch. Raises CheckSkipped where that goes wrong: other checks say how."""
    started = time.monotonic()
    try:
        window = lab.window([lab.batch(size)])
    except Exception as error:
        raise CheckSkipped(
            f"with one micro-batch the step raises {describe(error)}, so windows cannot be judged"
        ) from None
    if not is_finite(window.gradients):
        raise CheckSkipped("gradients are NaN or infinite with one micro-batch, so windows cannot be judged")
    return time.monotonic() - started


def _ragged(case: TrainingCase, lab: Lab, trial: Trial) -> list[Trial]:
    """The same with half of its last micro-batch, as at the end of an epoch."""
    last = trial.parts[-1]
    if (pytree.batch_length(last) or 0) < 2:
        return []
    try:
        half = next(iter(case.split(last, 2)))
    except Exception:
        return []
    if _too_small(lab, [half]):
        return []
    return [Trial([*trial.parts[:-1], half], False, False)]


def _too_small(lab: Lab, parts: Sequence[Any]) -> str | None:
    """Why the step cannot take one of these alone: BatchNorm has no statistics of a single sample."""
    smallest = min(parts, key=lambda part: pytree.batch_length(part) or 0)
    if (pytree.batch_length(smallest) or 0) > 1:
        return None
    try:
        lab.window([smallest])
    except Exception as error:
        return f"on a single sample the step raises {describe(error)}"
    return None


def _judge_split(full: Any, parts: Sequence[Any]) -> None:
    """Raises CheckFailed where a leaf with a row a sample has fewer or more of them in pieces."""
    rows, pieces = read(full), [read(part) for part in parts]
    for path, leaf in rows.items():
        if leaf.rows is None or any(path not in piece or piece[path].rows is None for piece in pieces):
            continue
        there = [row for piece in pieces for row in piece[path].rows or ()]
        if len(there) < len(leaf.rows) and len(set(leaf.rows)) > 1:
            raise CheckFailed(
                f"split(batch, {len(parts)}) gives {len(there)} of {len(leaf.rows)} samples: the effective "
                "batch is not the one asked for"
            )
        if more := Counter(there) - Counter(leaf.rows):
            known = sum(count for row, count in more.items() if row in leaf.rows)
            if known and len(there) >= len(leaf.rows):
                raise CheckFailed(
                    f"split(batch, {len(parts)}) gives {known} of {len(leaf.rows)} samples more than once"
                )


def shares(case: TrainingCase, parts: Sequence[Any]) -> list[float]:
    """What each piece counts, by the case's own reduction."""
    if case.loss_reduction == "sum":
        return [1.0] * len(parts)
    if case.loss_reduction == "token_mean":
        assert callable(case.num_targets)
        counts = [float(case.num_targets(part)) for part in parts]
    else:
        counts = [float(pytree.batch_length(part) or 1) for part in parts]
    total = sum(counts)
    return [count / total if total else 0.0 for count in counts]


def plain(case: TrainingCase, parts: Sequence[Any]) -> list[float]:
    """What each piece counts to a loop that counts micro-batches."""
    return [1.0 if case.loss_reduction == "sum" else 1.0 / len(parts)] * len(parts)


def is_finite(gradients: Gradients) -> bool:
    return all(bool(one.isfinite().all()) for one in gradients.values() if one is not None)


def names_of(wrong: Sequence[str], owners: dict[str, Any]) -> str:
    """The first few of them, with the modules that own them."""
    texts = [f"{name} ({owners[name]})" if name in owners else name for name in wrong[:3]]
    return ", ".join(texts) + (f" and {len(wrong) - 3} more" if len(wrong) > 3 else "")
