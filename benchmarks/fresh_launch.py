"""What a fresh launch of two ranks costs that do one ``all_reduce``, beside four other ways to start them.

    python -m benchmarks.fresh_launch

Every way starts new processes each time, forms a gloo group, reduces one number, checks the result and
ends the processes; the time is what the caller waits. The rivals: ``torchrun --nproc-per-node 2`` on a
script, PyTorch's ``MultiProcessTestCase``, and both ways of DeepSpeed's ``DistributedTest``: spawned
processes, and a new pool from a fork server without torch (its default).

``launch`` forks from a server that has torch loaded. Its first launch in a process starts that server:
the row "server started anew" is what that one costs, with torch in the page cache. It is not the claim.

Claims: at least 30 times faster than torchrun, 15 times faster than each of the others.
``MultiProcessTestCase`` needs ``pip install expecttest``; without it that claim is not measured.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Sequence
from multiprocessing import util
from pathlib import Path

from benchmarks._harness import interleave, options, ratio, report, run_command, scratch
from pytest_gputrain.launch import Launcher, shutdown

ROUNDS = 9
REPEATS = 5
COLD_ROUNDS = 5
TIMEOUT = 120.0
OURS = "launch"
COLD = "launch, server started anew"
TORCHRUN = "torchrun"
CASE = "MultiProcessTestCase"
SPAWN = "DeepSpeed-style spawn"
POOL = "DeepSpeed-style pool"
CLAIMS = {TORCHRUN: 30.0, CASE: 15.0, SPAWN: 15.0, POOL: 15.0}

SCRIPT = """\
import torch
import torch.distributed as dist

dist.init_process_group("gloo")
tensor = torch.ones(1)
dist.all_reduce(tensor)
assert tensor.item() == 2
dist.destroy_process_group()
"""


def all_reduce_once() -> float:
    """What our ranks run; they need nothing of this module, so it travels by name."""
    import torch
    import torch.distributed as dist

    tensor = torch.ones(1)
    dist.all_reduce(tensor)
    return tensor.item()


def fresh() -> None:
    """One launch, its temporary folder removed."""
    assert Launcher()(all_reduce_once, world_size=2, timeout=TIMEOUT).values == [2.0, 2.0]


def cold() -> None:
    """One launch that has to start the fork server first."""
    shutdown()
    fresh()


def torchrun(script: Path) -> None:
    """The command, as installed with torch (``-m torch.distributed.run`` is what ``torchrun`` runs)."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", str(script)]
    run_command(command, timeout=TIMEOUT, cwd=script.parent)


def rivals(script: Path) -> dict[str, Callable[[], object]]:
    """Name to run. Imports torch, as the test modules of the rivals do, before anything is timed."""
    from benchmarks import _rivals

    ways: dict[str, Callable[[], object]] = {
        OURS: fresh,
        TORCHRUN: lambda: torchrun(script),
        SPAWN: _rivals.spawn_processes,
        POOL: _rivals.forkserver_pool,
    }
    if importlib.util.find_spec("expecttest") is not None:
        from benchmarks._multi_process_case import run_case

        ways[CASE] = run_case
    return ways


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and report. Returns 0 when every claim holds; a quick run only has to get to its end."""
    given = options(__doc__, argv)
    util.get_temp_dir()  # multiprocessing's own; it removes it itself when the process ends
    with scratch() as folder:
        script = folder / "all_reduce.py"
        script.write_text(SCRIPT)
        ways = rivals(script)
        fresh()  # starts the server
        rounds, warm_up = (1, 0) if given.quick else (ROUNDS, 1)
        seconds = interleave(ways, rounds, warm_up, repeats={OURS: REPEATS})
        seconds |= interleave({COLD: cold}, 1 if given.quick else COLD_ROUNDS, warm_up=0)
        shutdown()
    measured = {name: ratio(seconds, name, OURS) for name in CLAIMS if name in seconds}
    figures: dict[str, float | int | str] = {f"times faster than {name}": x for name, x in measured.items()}
    if CASE not in measured:
        figures[f"times faster than {CASE}"] = "not measured: pip install expecttest"
    held = all(measured.get(name, 0.0) >= least for name, least in CLAIMS.items())
    claim = ", ".join(f"{name} {least:.0f} x" for name, least in CLAIMS.items())
    report(
        "fresh_launch",
        seconds,
        {**figures, "claim": claim, "claim_holds": str(held)},
        ours=OURS,
        results=given.results,
    )
    return 0 if held or given.quick else 1


if __name__ == "__main__":
    sys.exit(main())
