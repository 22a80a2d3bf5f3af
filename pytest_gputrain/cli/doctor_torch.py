"""What ``gputrain doctor`` starts processes for: torch's view of the machine, and real steps on 2 ranks.

Not here and not asked: how fast anything is.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

from pytest_gputrain.devices.probes import TORCH_TIMEOUT

# A step takes a tenth of a second; a machine under load, or NCCL finding its way, far longer.
STEP_TIMEOUT, STEP_STALL = 120.0, 60.0

# CUDA is initialised in the child alone, and every GPU really used: that a driver lists it proves little.
SCRIPT = """
import json, sys
import torch
found = {"version": torch.__version__, "cuda": torch.version.cuda, "num_gpus": torch.cuda.device_count()}
try:
    found["nccl"] = ".".join(map(str, torch.cuda.nccl.version())) if torch.version.cuda else None
except Exception as error:
    found["nccl"] = None
numbers = range(found["num_gpus"])
try:
    for number in numbers:
        torch.ones(1, device=f"cuda:{number}").add_(1).item()
    pairs = [(one, other) for one in numbers for other in numbers if one < other]
    found["peers"] = [[*pair, torch.cuda.can_device_access_peer(*pair)] for pair in pairs]
except Exception as error:
    found["broken"] = f"{type(error).__name__}: {error}".splitlines()[0]
print(json.dumps(found))
"""


class NoAnswer(Exception):
    """torch could not be asked; the message is one line."""


def ask_torch(timeout: float = TORCH_TIMEOUT) -> dict[str, Any]:
    """Return what torch says of itself and of the GPUs, in a child process. Raises ``NoAnswer``."""
    try:
        done = subprocess.run(
            [sys.executable, "-c", SCRIPT],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=timeout,
        )
    except subprocess.TimeoutExpired:
        raise NoAnswer(f"torch in a child process did not answer within {timeout:.0f} s") from None
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or ["nothing said"])[-1]
        raise NoAnswer(f"torch in a child process left with exit code {done.returncode}: {last}")
    try:
        answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    except (ValueError, IndexError):
        raise NoAnswer(f"torch gave an answer that cannot be read: {done.stdout[-100:]!r}") from None
    return answer


def try_step(device: str, gpus: Sequence[str] = ()) -> str | None:
    """Run one DDP step on 2 real ranks; return None where it does what it should, else one line why not."""
    from pytest_gputrain.launch import LaunchDefaults, Launcher, LaunchUsageError
    from pytest_gputrain.launch.errors import ServerLost

    launcher = Launcher(defaults=LaunchDefaults(timeout=STEP_TIMEOUT, stall=STEP_STALL, gpus=tuple(gpus)))
    try:
        result = launcher(ddp_step, device, device=device, check=False)
    except (LaunchUsageError, ServerLost, OSError) as error:
        return " ".join(str(error).split())
    if not result.passed:
        return result.summary().splitlines()[0]
    return None if result.values == [1.5, 1.5] else f"gradients are {result.values} and not [1.5, 1.5]"


def ddp_step(device: str) -> float:
    """In each rank: a training step whose averaged gradient is known, 1.5 for the inputs 1 and 2."""
    import torch
    import torch.distributed as dist
    from torch.nn.parallel import DistributedDataParallel

    where = torch.device("cuda", torch.cuda.current_device()) if device == "cuda" else torch.device("cpu")
    model = torch.nn.Linear(4, 1, bias=False).to(where)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    inputs = torch.full((2, 4), dist.get_rank() + 1.0, device=where)
    wrapped = DistributedDataParallel(model)  # kept: without it its hooks are gone before the backward pass
    wrapped(inputs).mean().backward()
    optimizer.step()
    assert model.weight.grad is not None
    return float(model.weight.grad.mean())
