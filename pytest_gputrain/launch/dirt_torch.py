"""What a function may leave behind in torch, and between ranks: the probes of ``dirt`` for these."""

from __future__ import annotations

import json
import multiprocessing
import random
import sys
import time
from collections.abc import Sequence
from typing import Any

from ..trace.pending import PointToPoint
from .dirt import Probe
from .dirt_quick import STANDARD, Attributes, Glance

_FLAGS = (
    "_get_cublas_allow_tf32", "_get_cublas_allow_bf16_reduced_precision_reduction",
    "_get_cublas_allow_fp16_accumulation", "_get_cublas_allow_fp16_reduced_precision_reduction",
    "_get_cudnn_allow_tf32", "_get_cudnn_benchmark", "_get_cudnn_deterministic", "_get_cudnn_enabled",
    "_get_mkldnn_deterministic", "_get_mkldnn_enabled", "_get_onednn_allow_tf32",
    "_get_deterministic_algorithms", "_get_deterministic_algorithms_warn_only",
    "_get_deterministic_fill_uninitialized_memory", "_get_float32_matmul_precision",
    "_get_cudnn_sdp_enabled", "_get_flash_sdp_enabled", "_get_math_sdp_enabled",
    "_get_mem_efficient_sdp_enabled", "_get_nnpack_enabled", "_get_warnAlways",
)  # fmt: skip
"""Switches of torch that its bindings can read without an argument; some builds lack some."""
_GRAD = (
    "is_grad_enabled", "is_inference_mode_enabled", "is_anomaly_enabled", "is_anomaly_check_nan_enabled",
    "_is_multithreading_enabled", "_is_torch_function_enabled", "_is_any_autocast_enabled",
    "is_autocast_cache_enabled", "get_autocast_cpu_dtype", "get_autocast_gpu_dtype",
)  # fmt: skip
_COMPLETION = 1.0
"""Seconds for collectives that were started and not waited for to come to their end by themselves."""
_GPU_MEMORY = 64 << 20
"""Bytes that may stay allocated on a GPU: communicators and workspaces of libraries."""


def probes() -> dict[str, Probe]:
    """State of torch in this process; the process group is ready."""
    import torch

    return {
        # The modes first: one that is left on may stop all else from being read.
        "function modes": torch._C._len_torch_function_stack,
        "dispatch modes": torch._C._len_torch_dispatch_stack,
        "compiled code": lambda: sys.modules["torch._dynamo.convert_frame"].FRAME_COUNTER,
        "process group": Glance(_group_in_short, _group),
        "default dtype": torch.get_default_dtype,
        # Setting one pushes a function mode.
        "default device": Glance(torch._C._len_torch_function_stack, torch.get_default_device),
        "flags": _named(torch._C, _FLAGS),
        "autograd": _named(torch._C, _GRAD),
        "saved tensor hooks": lambda: _saved_tensor_hooks(torch),
        "threads of torch": lambda: (torch.get_num_threads(), torch.get_num_interop_threads()),
        "denormals are flushed": lambda: 5e-324 * random_one() == 0.0,
        "global hooks": _global_hooks(),
        "print options": lambda: dict(vars(sys.modules["torch._tensor_str"].PRINT_OPTS)),
        "multiprocessing": lambda: (
            multiprocessing.get_start_method(allow_none=True) or multiprocessing.get_all_start_methods()[0],
            torch.multiprocessing.get_sharing_strategy(),
        ),
        "NumPy": _numpy,
        "replaced functions": _attributes(torch),
    }


def random_one() -> float:
    """1.0, in a way that the compiler of byte code cannot fold."""
    return float(len(_FLAGS) > 0)


def _named(space: Any, names: Sequence[str]) -> Probe:
    known = [(name.lstrip("_").removeprefix("get_"), getattr(space, name, None)) for name in names]
    readers = {name: reader for name, reader in known if reader is not None and _answers(reader)}
    return lambda: {name: reader() for name, reader in readers.items()}


def _answers(reader: Any) -> bool:
    try:
        reader()
    except Exception:  # a build without that library
        return False
    return True


def _saved_tensor_hooks(torch: Any) -> object:
    autograd = torch._C._autograd
    return autograd._saved_tensors_hooks_is_enabled(), autograd._top_saved_tensors_default_hooks(True) is None


def _global_hooks() -> Probe:
    """Hooks on every module and every optimizer, by the table they are in."""
    known = [
        (vars(sys.modules[name]), table)
        for name in ("torch.nn.modules.module", "torch.optim.optimizer")
        for table, hooks in vars(sys.modules[name]).items()
        if table.startswith("_global_") and hasattr(hooks, "__len__")
    ]
    return lambda: {table.removeprefix("_global_"): len(space[table]) for space, table in known}


def _numpy() -> object:
    """None as long as it is not loaded, and its defaults once it is."""
    numpy = sys.modules.get("numpy")
    if numpy is None or not hasattr(numpy, "geterr"):
        return None
    shown = numpy.get_printoptions()
    return {**numpy.geterr(), **{name: shown[name] for name in ("precision", "threshold", "linewidth")}}


def _attributes(torch: Any) -> Attributes:
    import torch.distributed as dist

    functional, tensor, module = torch.nn.functional, torch.Tensor, torch.nn.Module
    spaces = (torch, functional, tensor, module, torch.optim.Optimizer, torch.autograd.Function)
    groups = (dist, sys.modules["torch.distributed.distributed_c10d"], dist.ProcessGroup)
    parallel = torch.nn.parallel.DistributedDataParallel
    return Attributes(*STANDARD, *spaces, *groups, parallel)


def _group_in_short() -> object:
    """All that ``_group`` depends on."""
    import torch.distributed as dist

    world: Any = sys.modules["torch.distributed.distributed_c10d"]._world
    return list(world.pg_names.values()), world.default_pg, dist.get_debug_level()  # type: ignore[attr-defined]


def _group() -> dict[str, object]:
    """The groups there are, and that the one made for the ranks is still theirs."""
    import torch.distributed as dist

    c10d: Any = sys.modules["torch.distributed.distributed_c10d"]
    if not dist.is_initialized():
        return {"the default group": None}
    found: dict[str, object] = {f"group {name!r}": 1 for name in c10d._world.pg_names.values()}
    found["the default group"] = id(c10d._world.default_pg)
    found["debug level"] = str(dist.get_debug_level())  # type: ignore[attr-defined]
    return found


class Traffic:
    """What went between the ranks, so that what did not arrive can be told once all have reported."""

    def __init__(self) -> None:
        self._p2p = PointToPoint()
        self._p2p.watch()

    def figures(self) -> dict[str, int]:
        """Totals since the group was made; ranks that left nothing open agree in them."""
        import torch.distributed as dist

        c10d: Any = sys.modules["torch.distributed.distributed_c10d"]
        group = c10d._world.default_pg
        if not dist.is_initialized():
            return {}
        collectives = group._get_sequence_number_for_group() - self._p2p.operations[group.group_name]
        groups = c10d._world.group_count
        return {"collectives": collectives, "groups": groups, "balance": self._p2p.balance}

    def dirt(self) -> list[str]:
        """Operations of this rank that nobody waited for. Waits a moment for those that end by themselves."""
        import torch

        found = []
        if open_p2p := self._p2p.unfinished():
            found.append(f"point-to-point operations: {open_p2p} not waited for")
        registry = getattr(torch._C._distributed_c10d, "_get_work_registry_size", lambda: 0)()
        if registry:
            found.append(f"functional collectives: {registry} not waited for")
        limit = time.monotonic() + _COMPLETION
        while (unfinished := _unfinished()) and time.monotonic() < limit:
            time.sleep(0.0002)
        if unfinished and (unfinished := min(unfinished, _open_entries(unfinished))):
            found.append(f"collectives: {unfinished} started and not completed")
        return found


def _unfinished() -> int:
    """Collectives that were started and are not done, by torch's own record."""
    import torch

    bindings: Any = torch._C._distributed_c10d
    status = json.loads(bindings._dump_fr_trace_json(False)).get("pg_status", {})
    return sum(
        max(0, int(group["last_enqueued_collective"]) - max(0, int(group["last_completed_collective"])))
        for group in status.values()
    )


def _open_entries(otherwise: int) -> int:
    """The same, entry by entry: the totals name the collective that ended last, and another may have been
    started last. ``otherwise`` where torch keeps no entries.
    """
    import torch

    bindings: Any = torch._C._distributed_c10d
    entries = json.loads(bindings._dump_fr_trace_json(True, False)).get("entries", [])
    ended = [one.get("retired") or one.get("state") == "completed" or one.get("is_p2p") for one in entries]
    return sum(not one for one in ended) if entries else otherwise


def renew() -> None:
    """Generators seeded anew, as in a new process; a timer of faulthandler's taken back."""
    import faulthandler

    faulthandler.cancel_dump_traceback_later()
    random.seed()
    torch = sys.modules["torch"]
    torch.default_generator.seed()
    if torch.cuda.is_initialized():
        torch.cuda.seed_all()
    if (numpy := sys.modules.get("numpy")) is not None:
        numpy.random.seed(random.getrandbits(32))  # without a number it takes ten times as long


def gpu_memory() -> int:
    """Bytes allocated on the GPU by torch; waits for the GPU, and raises if an earlier kernel failed."""
    torch = sys.modules["torch"]
    if not torch.cuda.is_initialized():
        return 0
    torch.cuda.synchronize()
    return int(torch.cuda.memory_allocated())


def gpu_dirt(before: int) -> list[str]:
    """A poisoned CUDA context, or memory that the function still holds on the GPU."""
    try:
        after = gpu_memory()
    except Exception as error:  # the context is lost: every later call of CUDA would raise this
        return [f"CUDA context: {type(error).__name__}: {str(error).splitlines()[0]}"[:300]]
    if after > before + _GPU_MEMORY:
        return [f"GPU memory: {(after - before) >> 20} MiB more allocated than before"]
    return []
