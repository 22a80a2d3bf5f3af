"""Losses as a text file: comments, then ``step loss`` a line, to keep with a program and compare with later.

A loss is written so that it comes back bit by bit. Imports no torch.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from pytest_gputrain.endurance.plan import StabilityUsageError


def write_losses(path: Path, losses: Mapping[int, float], about: Iterable[str]) -> None:
    """losses: by step. about: lines that say what was run."""
    lines = [*(f"# {line}" for line in about), "# step loss"]
    path.write_text("\n".join([*lines, *(f"{s} {v!r}" for s, v in losses.items())]) + "\n", encoding="utf-8")


def read_losses(path: Path) -> dict[int, float]:
    """By step. Raises StabilityUsageError, one line, for what `write_losses` did not write."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        why = getattr(error, "strerror", None) or "not a text file"
        raise StabilityUsageError(f"losses {path}: cannot be read ({why})") from None
    found: dict[int, float] = {}
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        try:
            step, loss = line.split()
            found[int(step)] = float(loss)
        except ValueError:
            raise StabilityUsageError(
                f"losses {path}: line {number} is {line.strip()[:40]!r}; legal is 'step loss', such as "
                "'12 3.4567', or a comment after #"
            ) from None
    if not found:
        raise StabilityUsageError(f"losses {path}: it holds no loss; give the losses.txt of an earlier run")
    return found


def departure(
    losses: Mapping[int, float], saved: Mapping[int, float], tolerance: float
) -> tuple[int, float, float] | None:
    """The first step at which a loss is not the saved one: (step, loss, saved loss). None where all agree.

    tolerance: relative to the saved loss; 0 is exactly.
    """
    for step in sorted(losses.keys() & saved.keys()):
        loss, wanted = losses[step], saved[step]
        if loss == wanted or (math.isnan(loss) and math.isnan(wanted)):
            continue
        if not abs(loss - wanted) <= tolerance * abs(wanted):
            return step, loss, wanted
    return None


def mean_losses(by_rank: Sequence[Mapping[int, float]]) -> dict[int, float]:
    """By step, the mean over the ranks; steps that every rank has."""
    if not by_rank:
        return {}
    steps = sorted(set.intersection(*(set(losses) for losses in by_rank)))
    return {step: _mean([losses[step] for losses in by_rank]) for step in steps}


def _mean(losses: Sequence[float]) -> float:
    return math.fsum(losses) / len(losses) if all(map(math.isfinite, losses)) else math.nan
