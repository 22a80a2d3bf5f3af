"""The environment of a phase: what helps to debug is set here; what the user set stays. Pure."""

from __future__ import annotations

from collections.abc import Mapping

# DETAIL checks every collective, and segfaults with DDP on gloo.
_ALWAYS = {
    "TORCH_DISTRIBUTED_DEBUG": "INFO",
    "TORCH_SHOW_CPP_STACKTRACES": "0",  # pages of C++ above the line that matters
    "TORCH_FR_BUFFER_SIZE": "2000",
    "PYTHONFAULTHANDLER": "1",
}
_ON_GPUS = {
    "NCCL_DEBUG": "INFO",
    "TORCH_NCCL_TRACE_BUFFER_SIZE": "2000",  # the name before torch 2.9
    "TORCH_NCCL_DUMP_ON_TIMEOUT": "1",
    "TORCH_NCCL_ASYNC_ERROR_HANDLING": "1",
    # Blocks that only fragmentation keeps from being used look like a leak.
    "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True",
}
# What is worth recording of a phase; never the whole environment, which may hold secrets.
_TELLING = (
    "CUDA_VISIBLE_DEVICES", "GLOO_", "GPUTRAIN_", "NCCL_", "OMP_NUM_THREADS", "PYTHONFAULTHANDLER",
    "PYTORCH_", "TORCH_",
)  # fmt: skip


def added(current: Mapping[str, str], switches: Mapping[str, str], *, device: str) -> dict[str, str]:
    """What a phase's ranks get on top of ``current``.

    The debugging settings give way to what is in ``current``; the switches do not: they make the phase.
    """
    wished = {**_ALWAYS, **(_ON_GPUS if device == "cuda" else {})}
    if device != "cuda":  # on a machine with GPUs a program would take them by itself
        wished["CUDA_VISIBLE_DEVICES"] = ""
    on_top = {name: value for name, value in wished.items() if name not in current}
    if device != "cuda":
        on_top["GPUTRAIN_BACKEND"] = "gloo"
    return {**on_top, **switches}


def recorded(current: Mapping[str, str], on_top: Mapping[str, str]) -> dict[str, str]:
    """The part of a phase's environment that decides how it ran."""
    both = {**current, **on_top}
    return {name: both[name] for name in sorted(both) if name.startswith(_TELLING)}
