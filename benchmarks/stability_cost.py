"""What watching a stability run costs: steps of the depth-4 GPT on 2 ranks with it, against without.

    python -m benchmarks.stability_cost

Off: the case's batch and step, as a check would run them. On: all that ``stable_training`` adds to a step:
digests of batch and weights, memory, files, threads, clocks, the record written, and every 20th step the
ranks' vote. One
process a rank, blocks of steps in turn, in an order that turns. Measured twice, in processor time of the rank
with all its threads: within the monitors themselves, and as the median over rounds of a side's median step
over that round's off, which sees what they do to the step beside them and needs a quiet machine: what "again"
costs is noise. Of the steps of a block one looks at every element. Live tensors, counted three times in 1,000
steps, are apart.

Claim: at most 1 % of step time within the monitors, what is done now and then included.
"""

from __future__ import annotations

import contextlib
import statistics
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks._harness import options, report
from pytest_gputrain.launch import Launcher, shutdown

DEPTH, BATCH_SIZE, RANKS = 4, 4, 2
ROUNDS, STEPS, WARM_UP = 7, 100, 10
COUNTS, RUN = 3, 1000  # counts of live tensors in so many steps
CLAIM = 1.0  # per cent
TIMEOUT = 1800.0
OFF, ON, AGAIN = "off", "on", "off, again"
WITHIN = "within the monitors"
SIDES = (OFF, ON, AGAIN)
Times = dict[str, list[float]]


def measure(sides: Sequence[str], steps: int) -> tuple[Times, Times, float]:
    """In a rank, one round: by side the median step in seconds of processor and by the clock; seconds of
    processor a step, on average, for what is done now and then.
    """
    import torch

    torch.set_num_threads(1)
    subject = _Subject()
    processor: Times = {}
    clock: Times = {}
    for side in sides:
        taken = subject.block(side == ON, steps)
        processor[side] = [statistics.median(one[0] for one in taken)]
        clock[side] = [statistics.median(one[1] for one in taken)]
        if side == ON:
            processor[WITHIN] = [statistics.fmean(one[2] for one in taken)]
    return processor, clock, subject.now_and_then()


def rounds_of(rounds: int, steps: int) -> tuple[Times, Times, float]:
    """Each in ranks of its own: what one leaves in malloc's lists would be the next one's cost."""
    processor: Times = {side: [] for side in (*SIDES, WITHIN)}
    clock: Times = {side: [] for side in SIDES}
    rare = []
    # One thread: threads that wait for each other measure the machine.
    launch = Launcher()
    for number in range(rounds):
        shift = number % len(SIDES)  # so that no side always follows the same one
        sides = SIDES[shift:] + SIDES[:shift]
        env = {"OMP_NUM_THREADS": "1"}
        ranks = launch(measure, sides, steps, world_size=RANKS, timeout=TIMEOUT, env=env).values
        for times, found in zip((processor, clock), ranks[0], strict=False):
            for side, taken in found.items():
                times[side] += taken
        rare.append(ranks[0][2])
    shutdown()
    return processor, clock, statistics.median(rare)


class _Subject:
    """The depth-4 GPT in this rank, and what a stability run needs beside it."""

    def __init__(self) -> None:
        from pytest_gputrain.checks.context import CheckContext
        from pytest_gputrain.checks.peers import Peers
        from pytest_gputrain.checks.session import build_model, build_optimizer, trained_parameters
        from pytest_gputrain.checks.stable_data import Feed
        from pytest_gputrain.reference.gpt import gpt_case

        self.case = gpt_case(DEPTH)
        self.ctx = CheckContext(world_size=RANKS, batch_size=BATCH_SIZE)
        self.peers = Peers()
        self.model = build_model(self.case, self.ctx)
        self.wrapped = self.case.wrap(self.model)
        self.optimizer = build_optimizer(self.case, self.model, self.wrapped)
        self.trained = list(trained_parameters(self.model, self.wrapped, self.optimizer).values())
        self.feed = Feed(self.case, self.ctx, self.peers.rank)
        self.step = 0
        self.in_step = 0.0

    def block(self, watched: bool, steps: int) -> list[tuple[float, float, float]]:
        """(seconds of processor, seconds, seconds of processor within the monitors) of each step."""
        import time

        from pytest_gputrain.endurance.records import RecordWriter

        found = []
        with tempfile.TemporaryDirectory(prefix="gputrain-bench-") as folder, contextlib.ExitStack() as stack:
            watch = stack.enter_context(self._watch()) if watched else None
            writer = RecordWriter(Path(folder) / "steps.jsonl")
            stack.callback(writer.close)
            for number in range(WARM_UP + steps):
                self.step += 1
                begun = time.process_time(), time.perf_counter()
                within = self._off() if watch is None else self._on(watch, writer)
                if number >= WARM_UP:
                    found.append((time.process_time() - begun[0], time.perf_counter() - begun[1], within))
        return found

    def now_and_then(self) -> float:
        """Seconds of processor a step, on average over a run of 1,000, for counts of live tensors."""
        import time

        from pytest_gputrain.checks.stable_memory import Census

        begun = time.process_time()
        Census({}, self._device(), RUN).look(20, 0)
        return (time.process_time() - begun) * COUNTS / RUN

    def _device(self) -> Any:
        import torch

        return torch.device("cpu")

    def _watch(self) -> Any:
        from pytest_gputrain.checks.stable_watch import Watch

        timed = self._timed

        class Timed(Watch):
            def _before(self, *given: Any) -> None:
                timed(super()._before)(*given)

        parts = self.case, self.model, self.wrapped, self.optimizer, self.trained, self._device()
        watch = Timed(*parts, limit=RUN)
        watch._arrivals._came = timed(watch._arrivals._came)  # type: ignore[method-assign]
        return watch

    def _timed(self, call: Any) -> Any:
        """What the monitors do within a step, counted too."""
        import time

        def called(*given: Any) -> None:
            begun = time.process_time()
            call(*given)
            self.in_step += time.process_time() - begun

        return called

    def _off(self) -> float:
        from pytest_gputrain.checks.session import draw_batch, loss_value

        loss_value(self._take(draw_batch(self.case, self.ctx, self.step % 8, self.peers.rank)))
        return 0.0

    def _on(self, watch: Any, writer: Any) -> float:
        """Seconds of processor within the monitors; one digest of the batch is taken twice for that."""
        import time

        from pytest_gputrain.checks.session import loss_value
        from pytest_gputrain.checks.stable_data import batch_digest, counted
        from pytest_gputrain.checks.stable_vote import is_due
        from pytest_gputrain.endurance.records import StepRecord

        watch.load()
        batch, digest = self.feed.next()
        entered, self.in_step = time.process_time(), 0.0
        size = counted(batch)
        batch_digest(batch)
        watch.begin()
        within = time.process_time() - entered
        begun = time.perf_counter()
        loss = loss_value(self._take(batch))
        seconds = time.perf_counter() - begun
        entered = time.process_time()
        watched = watch.end(1_000_003 + self.step, seconds, loss)
        record = StepRecord(
            step=self.step,
            loss=loss,
            seconds=seconds,
            **size,
            batch_digest=digest,
            wall=time.time(),
            **watched,
        )
        writer.write(record)
        if is_due(self.step):
            self.peers.agree(record.digest or "", False)
        watch.voted()
        return within + self.in_step + time.process_time() - entered

    def _take(self, batch: Any) -> Any:
        from pytest_gputrain.checks.session import seed_for, take_step

        seed = seed_for(self.ctx, self.step, self.peers.rank)
        return take_step(self.case, self.wrapped, self.optimizer, [batch], seed)


def cost(seconds: Times, side: str) -> float:
    """Per cent of step time, by the median over rounds."""
    ratios = [mine / other for mine, other in zip(seconds[side], seconds[OFF], strict=True)]
    return 100 * (statistics.median(ratios) - 1)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and report. Returns 0 when the claim holds; a quick run only has to get to its end."""
    given = options(__doc__, argv)
    rounds, steps = (1, 2) if given.quick else (ROUNDS, STEPS)
    processor, clock, rare = rounds_of(rounds, steps)
    now_and_then = 100 * rare / statistics.median(processor[OFF])
    shares = [a / b for a, b in zip(processor[WITHIN], processor[OFF], strict=True)]
    within = 100 * statistics.median(shares)
    figures: dict[str, float | int | str] = {
        "model": f"GPT of depth {DEPTH}, {BATCH_SIZE} sequences a rank, {RANKS} ranks",
        "steps a round": steps,
        "% of processor time within the monitors": round(within, 2),
        "% of processor time that steps with them take longer": round(cost(processor, ON), 2),
        "% of processor time for nothing, again": round(cost(processor, AGAIN), 2),
        "% of processor time for what is done now and then": round(now_and_then, 2),
        "% of the clock's time that steps with them take longer": round(cost(clock, ON), 2),
        "% of the clock's time for nothing, again": round(cost(clock, AGAIN), 2),
        "ms of processor a step, off": round(1000 * statistics.median(processor[OFF]), 2),
        "ms of the clock a step, off": round(1000 * statistics.median(clock[OFF]), 2),
        "claim": f"watching costs at most {CLAIM} % of the processor time of a step",
        "claim_holds": str(within + now_and_then <= CLAIM),
    }
    report("stability_cost", processor, figures, ours=OFF, results=given.results)
    return 0 if within + now_and_then <= CLAIM or given.quick else 1


if __name__ == "__main__":
    sys.exit(main())
