"""What a stability run needs to go on after a kill, as plain data and tensors, a file a rank.

The first rank keeps model and optimizer; the others their buffers, or all of it where ranks hold different
parameters. No random states: every step and every draw is seeded by its number. Not kept: what a step keeps
for itself, unless ``case.step`` has ``state_dict`` and ``load_state_dict``.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from pytest_gputrain.checks.result import CheckUndecided
from pytest_gputrain.endurance.folder import checkpoint_path, remove_checkpoints

FORMAT = "pytest-gputrain stability checkpoint 1"


def save(folder: Path, step: int, rank: int, run: Any) -> None:
    """The old file or the new one is there, whenever this process dies; ``run`` is the rank's run."""
    import torch

    content: dict[str, Any] = {"format": FORMAT, "step": step, "position": run.feed.step, "rank": rank}
    content["buffers"] = dict(run.wrapped.named_buffers())
    if rank == 0 or not run.same_everywhere:
        content["parameters"] = dict(run.parameters)
        content["optimizer"] = _optimizer_state(run.optimizer)
        content["step_state"] = run.case.step.state_dict() if _has_state(run.case.step) else None
    path = checkpoint_path(folder, step, rank)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        torch.save(content, unfinished)
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)
    run.peers.any_rank(False)  # only when all have written may the one before go
    remove_checkpoints(folder, rank, keep=step)


def load(folder: Path, step: int, rank: int, run: Any) -> None:
    """Raises CheckUndecided, one line, where a file cannot be used."""
    import torch

    own = _read(checkpoint_path(folder, step, rank))
    shared = own if "parameters" in own else _read(checkpoint_path(folder, step, 0))
    try:
        with torch.no_grad():
            for name, parameter in run.parameters.items():
                parameter.copy_(shared["parameters"][name])
            for name, buffer in run.wrapped.named_buffers():
                buffer.copy_(own["buffers"][name])
        _load_optimizer(run.optimizer, shared["optimizer"])
        if shared["step_state"] is not None:
            run.case.step.load_state_dict(shared["step_state"])
    except (KeyError, RuntimeError, ValueError) as error:
        raise CheckUndecided(
            f"{folder}: the checkpoint of step {step} does not fit this model "
            f"({str(error).splitlines()[0]}); remove the folder to start anew"
        ) from None


def _read(path: Path) -> dict[str, Any]:
    import torch

    try:
        content: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises several types for files that it did not write whole
        why = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise CheckUndecided(
            f"{path}: cannot be read ({why}); remove the run's folder to start anew"
        ) from None
    return content


def _has_state(step: Any) -> bool:
    return callable(getattr(step, "state_dict", None)) and callable(getattr(step, "load_state_dict", None))


def _optimizer_state(optimizer: Any) -> Any:
    if isinstance(optimizer, (list, tuple)):
        return [one.state_dict() for one in optimizer]
    return optimizer.state_dict() if callable(getattr(optimizer, "state_dict", None)) else None


def _load_optimizer(optimizer: Any, state: Any) -> None:
    if isinstance(state, list):
        for one, own in zip(optimizer, state, strict=True):
            one.load_state_dict(own)
    elif state is not None:
        optimizer.load_state_dict(state)
