"""The golden comparison of tensor-parallel models: what it takes, how exact healthy plans are, what it sees.

    python -m benchmarks.tp_golden

- OPT-125M in its full size on 2 gloo ranks, and tiny OPT: ``tp_forward`` and ``tp_backward``, with the start
  of the ranks and the building of the models; for the full size also the memory of all processes (the sum of
  their proportional shares, every tenth of a second).
- Tiny OPT with 8 heads on 8 simulated ranks, the same two checks.
- The largest relative error of any gradient, float32 and float64.
- Beside it what is usual: ``torch.testing.assert_close`` on the logits alone, over the planted programs of
  ``tests/planted``: how many broken ones it sees, and how many ``tp_*`` checks see.

Claims: full size under 60 s and 8 GB, tiny under 5 s, simulated under 10 s; errors of tiny OPT 1e-4, 1e-10.
"""

from __future__ import annotations

import contextlib
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import psutil

from benchmarks._harness import options, report
from pytest_gputrain import TrainingCase, run_checks
from pytest_gputrain.launch import Launcher, shutdown

BOTH = ("tp_forward", "tp_backward")
FULL_SECONDS, FULL_BYTES, TINY_SECONDS, SIMULATED_SECONDS = 60.0, 8e9, 5.0, 10.0
FLOAT32, FLOAT64 = 1e-4, 1e-10
SAMPLED = 0.1
TIMEOUT = 600.0


def eight_heads(dtype: str = "float32") -> Any:
    """Tiny OPT that 8 ranks divide."""
    import torch
    from transformers import OPTConfig, OPTForCausalLM

    from pytest_gputrain.reference.opt import SIZES

    config = OPTConfig(**{**SIZES["opt-tiny"], "num_attention_heads": 8})
    return OPTForCausalLM(config).to(getattr(torch, dtype)).train()


def both(case: TrainingCase, **options: Any) -> dict[str, Any]:
    """The two checks' figures. Raises AssertionError where one does not pass."""
    figures: dict[str, Any] = {}
    for result in run_checks(case, checks=BOTH, timeout=TIMEOUT, **options):
        assert result.outcome == "passed", str(result)
        figures |= dict(result.figures)
    return figures


@contextlib.contextmanager
def peak_of_all() -> Iterator[list[int]]:
    """Bytes of this process and all below it, their largest sum in a list of one."""
    peak, done = [0], threading.Event()

    def watch() -> None:
        while not done.wait(SAMPLED):
            peak[0] = max(peak[0], _bytes())

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield peak
    finally:
        done.set()
        watcher.join()


def _bytes() -> int:
    own = psutil.Process()
    total = 0
    for process in (own, *own.children(recursive=True)):
        with contextlib.suppress(psutil.Error):
            total += process.memory_full_info().pss
    return total


def seen_by_assert_close(case: TrainingCase) -> bool:
    """In a rank: whether the usual comparison of logits fails on any rank."""
    import copy

    import torch
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh

    torch.set_num_threads(1)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("tp",))
    torch.manual_seed(0)
    model = case.model().eval()
    batch = case.batch(2, torch.device("cpu"))
    with torch.no_grad():
        wanted = model(batch["x"])
        parallel: Any = case.parallelize
        parallel = parallel(copy.deepcopy(model), mesh).eval()
        got = parallel(batch["x"])
    got = got.full_tensor() if hasattr(got, "full_tensor") else got
    if got.shape != wanted.shape:  # a user would join the parts before comparing
        parts: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(parts, got)
        got = torch.cat(parts, -1)[..., : wanted.size(-1)]
    try:
        torch.testing.assert_close(got, wanted)
    except AssertionError:
        return True
    return False


def planted(quick: bool) -> dict[str, tuple[int, int]]:
    """(seen, of how many) of the planted programs, by who looks."""
    from tests.planted import BROKEN, HEALTHY

    launcher = Launcher()
    ours = [plant for plant in BROKEN if any(check.startswith("tp_") for check in plant.fails)]
    ours = ours[:3] if quick else ours
    healthy = [plant for plant in HEALTHY if plant.case.__module__.endswith("tensor_parallel")]
    healthy = healthy[:1] if quick else healthy
    close = caught = alarms = 0
    for plant in ours:
        seen = any(launcher(seen_by_assert_close, plant.case(), world_size=2).values)
        results = run_checks(plant.case(), checks=list(plant.fails))
        found = any(result.outcome == "failed" for result in results)
        print(f"{plant.name:60} assert_close {'sees' if seen else '-':5} tp_* {'see' if found else '-'}")
        close, caught = close + seen, caught + found
    for plant in healthy:
        alarms += any(launcher(seen_by_assert_close, plant.case(), world_size=2).values)
    return {
        "assert_close": (close, len(ours)),
        "checks": (caught, len(ours)),
        "alarms": (alarms, len(healthy)),
    }


def timed(run: Any, rounds: int) -> tuple[list[float], dict[str, Any]]:
    seconds, figures = [], {}
    for _ in range(rounds):
        start = time.perf_counter()
        figures = run()
        seconds.append(time.perf_counter() - start)
    return seconds, figures


def main(argv: Sequence[str] | None = None) -> int:
    from pytest_gputrain.reference import opt, opt125m

    given = options(__doc__, argv)
    rounds = 1 if given.quick else 5
    eight = replace(opt.case, name="opt-8-heads", model=eight_heads)
    try:
        both(opt.case)  # starts the server, which every session does once
        tiny, figures = timed(partial(both, opt.case), rounds)
        exact = both(replace(opt.case, model=partial(eight_heads, "float64")))
        simulated, _ = timed(partial(both, eight, simulated=True, world_size=8), rounds)
        full: list[float] = []
        full_figures: dict[str, Any] = {}
        with peak_of_all() as peak:
            if not given.quick:
                full, full_figures = timed(partial(both, opt125m.case), 2)
        seen = planted(given.quick)
    finally:
        shutdown()
    seconds = {"tiny OPT, 2 ranks": tiny, "OPT with 8 heads, 8 simulated ranks": simulated}
    if full:
        seconds["OPT-125M, 2 ranks"] = full
    error = "largest relative error"
    measured: dict[str, float | int | str] = {
        "gradient error float32, tiny OPT": figures[error],
        "gradient error float64, tiny OPT": exact[error],
        "broken programs": seen["checks"][1],
        "seen by tp_* checks": seen["checks"][0],
        "seen by assert_close on logits": seen["assert_close"][0],
        "healthy programs": seen["alarms"][1],
        "assert_close fails on healthy ones": seen["alarms"][0],
    }
    if full:
        measured["gradient error float32, OPT-125M"] = full_figures[error]
        measured["OPT-125M, memory of all processes in GB"] = peak[0] / 1e9
    report("tp_golden", seconds, measured, results=given.results)
    holds = {
        "tiny under 5 s": min(tiny) < TINY_SECONDS,
        "simulated under 10 s": min(simulated) < SIMULATED_SECONDS,
        "errors of tiny OPT": figures[error] <= FLOAT32 and exact[error] <= FLOAT64,
        "every broken program is seen": seen["checks"][0] == seen["checks"][1],
        "full size": not full or (min(full) < FULL_SECONDS and peak[0] < FULL_BYTES),
    }
    for claim, held in holds.items():
        print(f"{claim}: {'holds' if held else 'DOES NOT HOLD'}")
    return 0 if given.quick or all(holds.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
