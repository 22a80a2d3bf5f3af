"""What tracing costs: steps of the depth-4 reference GPT with tracers and watchdog on, against off.

    python -m benchmarks.tracing_cost

On two ranks (gloo, DDP) and in one process. In each round every set of tracers trains a fresh copy of the
model for a few steps, in turn; a set's cost is the median over rounds of its step time over that round's
without tracing. A step of this model is short, which is the hard case: what tracers do is the same for any.
The set of the claim has more rounds of its own, with no tracing twice: what the second "costs" is noise.

Claim: what ``trace=True`` switches on costs at most 2 % of step time. ``module_bwd`` is not in it.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from benchmarks._harness import options, report
from pytest_gputrain.launch import Launcher, shutdown
from pytest_gputrain.trace.switches import DEFAULT_TRACERS, TRACERS

DEPTH, BATCH_SIZE = 4, 4
ROUNDS, CLAIM_ROUNDS, STEPS, WARM_UP = 3, 30, 8, 2
CLAIM = 2.0  # per cent
TIMEOUT = 900.0
OFF, AGAIN, DEFAULT, ALL = "off", "off, again", "trace=True", "all tracers"
SETS: dict[str, tuple[str, ...]] = {
    OFF: (),
    DEFAULT: DEFAULT_TRACERS,
    **{tracer: (tracer,) for tracer in TRACERS},
    ALL: TRACERS,
}
OF_THE_CLAIM: dict[str, tuple[str, ...]] = {OFF: (), DEFAULT: DEFAULT_TRACERS, AGAIN: ()}


def measure(sets: dict[str, tuple[str, ...]], rounds: int, steps: int) -> dict[str, list[float]]:
    """In a rank: by set of tracers, the median step time of each round in seconds."""
    names = list(sets)
    found: dict[str, list[float]] = {name: [] for name in names}
    with tempfile.TemporaryDirectory() as folder:
        for number in range(-1, rounds):  # the first round warms up
            shift = number % len(names)  # so that no set always follows the same one
            for name in names[shift:] + names[:shift]:
                seconds = train(sets[name], Path(folder), steps)
                if number >= 0:
                    found[name].append(statistics.median(seconds))
    return found


def train(tracers: tuple[str, ...], folder: Path, steps: int) -> list[float]:
    """Seconds of each step of a fresh model under these tracers."""
    import time

    import torch
    import torch.distributed as dist
    from torch.nn.parallel import DistributedDataParallel

    from pytest_gputrain.reference.gpt import gpt_case
    from pytest_gputrain.trace.install import installed
    from pytest_gputrain.trace.switches import Switches

    case = gpt_case(DEPTH)
    record = Switches(tracers=tracers).as_record() if tracers else None
    seconds = []
    with installed(record, folder, dist.get_rank(), watchdog_seconds=30.0):
        torch.manual_seed(0)
        model = case.model()
        if dist.get_world_size() > 1:
            model = DistributedDataParallel(model)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        for _ in range(WARM_UP + steps):
            batch = case.batch(BATCH_SIZE, "cpu")
            start = time.perf_counter()
            case.loss(model, batch).backward()
            optimizer.step()
            optimizer.zero_grad()
            seconds.append(time.perf_counter() - start)
    return seconds[WARM_UP:]


def cost(seconds: dict[str, list[float]], name: str) -> float:
    """Per cent of step time, by the median over rounds."""
    ratios = [on / off for on, off in zip(seconds[name], seconds[OFF], strict=True)]
    return 100 * (statistics.median(ratios) - 1)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and report. Returns 0 when the claim holds; a quick run only has to get to its end."""
    given = options(__doc__, argv)
    rounds, claim_rounds, steps = (1, 1, 1) if given.quick else (ROUNDS, CLAIM_ROUNDS, STEPS)
    measured: dict[str, list[float]] = {}
    figures: dict[str, float | int | str] = {"steps a round": steps, "batch size": BATCH_SIZE}
    held = True
    for world_size, where in ((1, "1 process"), (2, "2 ranks")):
        for sets, times in ((SETS, rounds), (OF_THE_CLAIM, claim_rounds)):
            # One thread a rank, on one process too: threads that wait for each other measure the machine.
            launch = Launcher()(
                measure, sets, times, steps,
                world_size=world_size, timeout=TIMEOUT, env={"OMP_NUM_THREADS": "1"},
            )  # fmt: skip
            seconds = launch.values[0]
            # The claim's rounds come last and take the place of the few before.
            measured |= {f"{where}: {name}": runs for name, runs in seconds.items()}
            for name in (name for name in sets if name != OFF):
                figures[f"{where}: % of step time for {name}"] = round(cost(seconds, name), 2)
        held &= cost(seconds, DEFAULT) <= CLAIM
    shutdown()
    claim = {"claim": f"{DEFAULT} costs at most {CLAIM} % of step time", "claim_holds": str(held)}
    report("tracing_cost", measured, {**figures, **claim}, results=given.results)
    return 0 if held or given.quick else 1


if __name__ == "__main__":
    sys.exit(main())
