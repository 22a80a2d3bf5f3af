"""What a discovery may be asked: every bound checked before anything runs. Imports no torch."""

from __future__ import annotations

import math
import numbers

from pytest_gputrain.batch.ladder import whole


def checked_margin(safety_margin: object) -> float:
    """Return the fraction of memory that may be used. Raises ``ValueError`` outside of (0, 1]."""
    is_number = isinstance(safety_margin, numbers.Real) and not isinstance(safety_margin, bool)
    if not (is_number and 0 < float(safety_margin) <= 1):  # type: ignore[arg-type]
        raise ValueError(
            f"safety_margin is {safety_margin!r}; legal is a fraction of the memory above 0 and up to 1, "
            "such as 0.85"
        )
    return float(safety_margin)  # type: ignore[arg-type]


def checked_range(min_batch_size: object, max_batch_size: object) -> tuple[int, int]:
    """Return both as ints. Raises ``ValueError`` when one is below 1 or the first is above the second."""
    least, most = whole("min_batch_size", min_batch_size), whole("max_batch_size", max_batch_size)
    if least > most:
        raise ValueError(
            f"min_batch_size {least} is above max_batch_size {most}; "
            "legal is 1 <= min_batch_size <= max_batch_size"
        )
    return least, most


def limit_in_bytes(capacity: int, safety_margin: float) -> int:
    """Return what may be used of a capacity: at least a byte, so that no margin means "no limit"."""
    return max(1, math.floor(capacity * safety_margin))


def per_rank(global_batch_size: int | None, world_size: int) -> int | None:
    """Return the samples of one optimizer step on one rank. Raises ``ValueError`` when they are not whole."""
    if global_batch_size is None:
        return None
    size = whole("global_batch_size", global_batch_size)
    share, rest = divmod(size, world_size)
    if rest:
        near = [one for one in (share * world_size, (share + 1) * world_size) if one]
        raise ValueError(
            f"global_batch_size {size} is not divisible by world size {world_size} "
            f"({size} = {share} * {world_size} + {rest}); "
            f"the nearest that are: {' and '.join(map(str, near))}"
        )
    return share


def dividing(name: str, size: object, share: int | None) -> int:
    """Return a batch size as an int. Raises ``ValueError`` when it is none, or does not divide ``share``."""
    chosen = whole(name, size)
    if share is not None and share % chosen:
        raise ValueError(
            f"{name} {chosen} does not divide {share}, the samples of a step on one rank "
            f"({share} = {share // chosen} * {chosen} + {share % chosen})"
        )
    return chosen


def checked_rank(ddp_rank: object, ddp_world_size: object) -> None:
    """Raise ``ValueError`` for a rank that cannot be one of so many."""
    rank, world_size = whole("ddp_rank", ddp_rank, 0), whole("ddp_world_size", ddp_world_size)
    if rank >= world_size:
        raise ValueError(f"ddp_rank is {rank} of ddp_world_size={world_size}; legal is 0 to {world_size - 1}")


def checked_steps(iterations: object) -> int:
    """Return the steps of a probe. Raises ``ValueError`` for fewer than 2."""
    if not isinstance(iterations, int) or iterations < 2:
        raise ValueError(
            f"iterations is {iterations!r}; legal is 2 or more: the optimizer's state is there "
            "from the second step on"
        )
    return iterations


def checked_factor(eval_batch_factor: object) -> float:
    """Return evaluation's batch by training's. Raises ``ValueError`` below 0."""
    is_number = isinstance(eval_batch_factor, numbers.Real) and not isinstance(eval_batch_factor, bool)
    if not (is_number and 0 <= float(eval_batch_factor) < math.inf):  # type: ignore[arg-type]
        raise ValueError(
            f"eval_batch_factor is {eval_batch_factor!r}; "
            "legal is 0 (no evaluation) or a number above, such as 2"
        )
    return float(eval_batch_factor)  # type: ignore[arg-type]
