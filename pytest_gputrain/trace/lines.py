"""The lines that tracers write, and the names of their files. Pure: read by people and by the diagnosis."""

from __future__ import annotations

from collections.abc import Sequence

TRACE_LOG = "traces.log"
PENDING_STACKS = "watchdog_pending.txt"
"""Where faulthandler answers, from C: what is found here becomes a stack dump with a name of its own."""


def heartbeat_file(rank: int) -> str:
    return f"heartbeat_rank{rank}.jsonl"


def stackdump_file(rank: int, stamp: str) -> str:
    return f"watchdog_stackdump_rank{rank}_{stamp}.txt"


def gradient_lines(
    step: int, num_arrived: int, missing: Sequence[str], model: str | None = None
) -> list[str]:
    """``[GRAD-TRACE] after_backward_step1 arrived=190 missing=5`` and a line for each that is missing.

    ``model`` is said where a script trains several.
    """
    suffix = f" model={model}" if model else ""
    head = f"[GRAD-TRACE] after_backward_step{step} arrived={num_arrived} missing={len(missing)}{suffix}"
    return [head, *(f"  - MISSING: {name}" for name in missing)]


def bucket_line(rank: int, num_elements: int, dtype: object) -> str:
    """``[DDP] rank=0 bucket_elems=1024 dtype=torch.float32``"""
    return f"[DDP] rank={rank} bucket_elems={num_elements} dtype={dtype}"


def module_line(step: int, module: str, state: str) -> str:
    """``[MODULE-BWD] step=1 blocks.4.attn grad_out=ok``; state: none, zero, nan, inf or ok."""
    return f"[MODULE-BWD] step={step} {module} grad_out={state}"
