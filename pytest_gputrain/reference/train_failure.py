"""How the training script ends out of memory: one line and exit code 1, where Python prints a traceback.

Only where it is run as a script: who calls ``main`` gets the exception. It stays uncaught, so that a launcher
still learns its type and line, and torch still puts the rank before the text.
"""

from __future__ import annotations

import sys
from types import TracebackType

from pytest_gputrain.batch.agreement import RankFailed
from pytest_gputrain.memory.oom import is_oom

_TEXT = "out of memory"
_WAYS_OUT = "give a smaller --device_batch_size, --auto_batch_size, or more memory"


def tell_in_one_line() -> None:
    """From now on an uncaught out-of-memory, or the failure of another rank, is one line on stderr."""
    otherwise = sys.excepthook

    def hook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        if is_oom(error):
            print(f"train: {out_of_memory(error)}", file=sys.stderr)
        elif isinstance(error, RankFailed):  # that rank shows its own traceback
            print(f"train: {_one_line(error)}", file=sys.stderr)
        else:
            otherwise(kind, error, trace)

    sys.excepthook = hook


def out_of_memory(error: BaseException) -> str:
    """What ran out, where, and what helps, in one line."""
    said = _one_line(error)
    if not said.startswith(_TEXT):
        said = f"{_TEXT}: {said or type(error).__name__}"
    return said if "what helps:" in said else f"{said}; {_WAYS_OUT}"


def _one_line(error: BaseException) -> str:
    return "; ".join(line.strip() for line in str(error).splitlines() if line.strip())
