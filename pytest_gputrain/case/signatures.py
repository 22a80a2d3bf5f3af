"""Whether a case's functions can be called as they are: told at once, and not by each check as a fault."""

from __future__ import annotations

import inspect
from typing import Any

# As docs/cases.md lists them.
CALLED_WITH: dict[str, tuple[str, ...]] = {
    "model": (),
    "batch": ("batch_size", "device"),
    "loss": ("model", "batch"),
    "num_targets": ("batch",),
    "split": ("batch", "n"),
    "optimizer": ("model",),
    "step": ("model", "optimizer", "micro_batches"),
    "wrap": ("model",),
    "compile": ("model",),
    "parallelize": ("model", "mesh"),
    "set_checkpointing": ("model", "layers"),
    "state_dict": ("model",),
    "batches": (),
}


def misfit(field: str, function: Any) -> str | None:
    """One line where ``function`` does not take what the field is called with; None where it does, or where
    Python does not know (functions of C).
    """
    try:
        # As it is called: a decorator may give what the wrapped function asks for more.
        signature = inspect.signature(function, follow_wrapped=False)
    except (TypeError, ValueError):
        return None
    arguments = CALLED_WITH[field]
    try:
        signature.bind(*arguments)
    except TypeError as error:
        name = getattr(function, "__name__", type(function).__name__)
        return f"{field} is {name}{signature}, and is called as {field}({', '.join(arguments)}): {error}"
    return None
