"""The last part of ``ddp_parity``: average the replays, compare with what the ranks had.

Three comparisons: the averaged gradients at the moment the ranks agreed; what the step's own processing
(clipping, unscaling) makes of the average; and, where the optimizer itself averages, the update.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pytest_gputrain.case import TrainingCase, pytree
from pytest_gputrain.checks.averages import Average, distance
from pytest_gputrain.checks.context import CheckContext
from pytest_gputrain.checks.parity import RankRun
from pytest_gputrain.checks.parity_hints import explain
from pytest_gputrain.checks.parity_replay import Replay, Replica, Tensors, read
from pytest_gputrain.checks.parity_verdict import Verdicts, is_rounding_only
from pytest_gputrain.checks.parity_words import Comparison
from pytest_gputrain.checks.result import CheckUndecided, Figures
from pytest_gputrain.trace.names import owners
from pytest_gputrain.trace.steps import AFTER_BACKWARD, AT_STEP, StepRecord


def judge(
    case: TrainingCase, ctx: CheckContext, folder: Path, runs: list[RankRun], replays: list[Replay]
) -> Figures:
    """In a rank of its own. Raises CheckFailed for a gradient or update that is not the reference's."""
    return _Reference(case, ctx, folder, runs, replays).judge()


class _Reference:
    def __init__(
        self, case: TrainingCase, ctx: CheckContext, folder: Path, runs: list[RankRun], replays: list[Replay]
    ) -> None:
        from pytest_gputrain.launch.payload import dumps

        self.ctx, self.folder, self.runs, self.replays = ctx, folder, runs, replays
        self.case, self._packed_case = case, dumps(case)
        self.facts = runs[0].steps
        self.first = self._replica()
        self.device = self.first.device
        touched = replays[0].processed | {name for facts in self.facts for name in facts.processed}
        self.processed = touched & set(self.first.parameters)
        self.verdicts = Verdicts(owners(self.first.model), len(runs), case.loss_reduction)

    def judge(self) -> Figures:
        self._check_names()
        self._measure_noise()
        comparisons = [self._compare(step, self._average(step)) for step in range(len(self.facts))]
        comparisons = self.verdicts.rescaled(comparisons)
        if any(comparison.wrong for comparison in comparisons) and self._agrees_with_joined_batch():
            self.verdicts.notes.append("agrees with the joined batch in one process, not with averaged ranks")
        else:
            self.verdicts.raise_for(comparisons, explain=self._explain)
            self._judge_processing()
        self._judge_updates()
        return self.verdicts.figures(len(self.facts))

    def _replica(self) -> Replica:
        """With a copy of the case, so that counters in a step's closure start again, as on a rank."""
        import cloudpickle

        return Replica(cloudpickle.loads(self._packed_case), self.ctx, self.folder)

    def _batches(self, step: int) -> list[list[Any]]:
        """By rank, its micro-batches."""
        return [self.first.unpacked(run.steps[step].micro_batches) for run in self.runs]

    def _check_names(self) -> None:
        recorded, here = set(self.facts[0].synced), set(self.first.parameters)
        if not recorded & here:
            raise CheckUndecided(
                "the wrapped model has none of the bare model's parameters (by name), so nothing can be "
                f"compared: {', '.join(sorted(recorded)[:3])} and {', '.join(sorted(here)[:3])}"
            )

    def _measure_noise(self) -> None:
        """What is not repeatable in one process cannot be asked of several."""
        for path in sorted(self.folder.glob("twin-*.pt")):
            twin = read(path, self.device)
            one = read(self.folder / path.name.replace("twin", "replay-0"), self.device)
            for name, gradient in one[AFTER_BACKWARD].items():
                self.verdicts.add_noise(name, distance(gradient, twin[AFTER_BACKWARD].get(name)))
        self.verdicts.check_repeatable()

    def _average(self, step: int) -> Average:
        average = Average(self._weights(step))
        for rank in range(len(self.runs)):
            average.add(read(self.folder / f"replay-{rank}-{step}.pt", self.device))
        return average

    def _weights(self, step: int) -> list[float]:
        """What each rank counts in the average."""
        world_size = len(self.runs)
        if self.case.loss_reduction != "token_mean":
            return [1.0 / world_size] * world_size
        count = self.case.num_targets
        assert callable(count)
        counts = [sum(float(count(part)) for part in micro_batches) for micro_batches in self._batches(step)]
        return [own / sum(counts) if sum(counts) else 1.0 / world_size for own in counts]

    def _actual(self, step: int) -> dict[str, Tensors]:
        actual: dict[str, Tensors] = read(self.folder / f"gradients-{step}.pt", self.device)
        return actual

    def _comparison(self, step: int) -> Comparison:
        return Comparison(step, self.facts[step].num_micro_batches)

    def _compare(self, step: int, average: Average) -> Comparison:
        """The ranks' gradients at the moment they agreed, against the average at that moment."""
        actual, comparison = self._actual(step), self._comparison(step)
        for name, moment in self.facts[step].synced.items():
            if moment is None or (moment == AT_STEP and name in self.processed):
                continue  # the update, or the step's processing of the average, is compared instead
            if name in self.first.parameters:
                self.verdicts.compare(comparison, name, actual[moment].get(name), average, moment)
        return comparison

    def _judge_processing(self) -> None:
        """Feed the average to the step in place of its own gradient: what reaches the optimizer then?"""
        if not self.processed:
            return
        replica, comparisons = self._replica(), []
        for step, facts in enumerate(self.facts):
            last = self.replays[0].backwards_before[step]
            inject = _Injection(replica.parameters, self._average(step), self.verdicts.factor, last)
            record = replica.take(step, 0, replica.unpacked(facts.micro_batches), after_backward=inject)
            actual, comparison = self._actual(step), self._comparison(step)
            expected = Average([1.0])
            expected.add(record.gradients)
            for name in sorted(self.processed & set(facts.synced)):
                if facts.synced[name] is not None and name in actual[AT_STEP]:
                    seen = actual[AT_STEP][name]
                    self.verdicts.compare(comparison, name, seen, expected, AT_STEP, factor=1.0)
            comparisons.append(comparison)
        self.verdicts.raise_for(comparisons, at="at the optimizer step, ", explain=self._explain)

    def _explain(self, comparison: Comparison) -> str | None:
        moments = {deviation.name: deviation.moment for deviation in comparison.wrong}
        token_mean = self.case.loss_reduction == "token_mean"
        return explain(
            self.folder, self.device, comparison.step, len(self.runs), moments, token_mean=token_mean
        )

    def _agrees_with_joined_batch(self) -> bool:
        """Losses that look across ranks (gathered negatives, SyncBatchNorm) need all samples in one batch."""
        try:
            replica, comparisons = self._replica(), []
            for step in range(len(self.facts)):
                columns = zip(*self._batches(step), strict=True)
                record = replica.take(step, 0, [pytree.join(list(column)) for column in columns])
                joined = Average([1.0])
                joined.add(record.gradients)
                comparisons.append(self._compare(step, joined))
        except Exception:
            return False  # batches that do not join have no such reference
        return not any(comparison.wrong for comparison in comparisons)

    def _judge_updates(self) -> None:
        """Where ranks agree in weights and not in gradients, the optimizer averages: compare its update."""
        names = {name for facts in self.facts for name, moment in facts.synced.items() if moment is None}
        names &= set(self.first.parameters)
        if not names:
            return
        replica, comparisons = self._replica(), []
        for step, facts in enumerate(self.facts):
            replica.load(f"parameters-{step}")
            before = {name: replica.parameters[name].detach().clone() for name in names}
            average = self._average(step)
            _update(replica, average, facts.rates)
            after = read(self.folder / f"parameters-{step + 1}.pt", self.device)
            comparison = self._comparison(step)
            for name in sorted(names):
                if is_rounding_only(name, average, AT_STEP, replica.parameters[name].dtype):
                    continue
                expected = replica.parameters[name].detach() - before[name]
                self.verdicts.compare_update(comparison, name, after[name] - before[name], expected)
            comparisons.append(comparison)
        self.verdicts.raise_for(comparisons, what="updates")
        self.verdicts.notes.append(
            f"{len(names)} parameters are averaged inside the optimizer: compared by update"
        )


def _update(replica: Replica, average: Average, rates: list[list[float]]) -> None:
    """One step of the case's optimizer on the averaged gradients, at the rates the ranks had."""
    from pytest_gputrain.trace.optimizers import optimizers_in

    for name, parameter in replica.parameters.items():
        parameter.grad = average.at(name, AT_STEP, like=parameter)
    optimizers = optimizers_in(replica.optimizer)
    for optimizer, own_rates in zip(optimizers, rates, strict=False):
        for group, rate in zip(optimizer.param_groups, own_rates, strict=False):
            group["lr"] = rate
    for optimizer in optimizers:
        optimizer.step()


class _Injection:
    """Puts the average into ``.grad`` after the last backward that precedes a parameter's update."""

    def __init__(self, parameters: Tensors, average: Average, factor: float, last: dict[str, int]) -> None:
        self.parameters, self.average, self.factor, self.last = parameters, average, factor, last

    def __call__(self, record: StepRecord) -> None:
        for name, parameter in self.parameters.items():
            if self.last.get(name) == record.backwards:
                gradient = self.average.at(name, AFTER_BACKWARD, like=parameter)
                parameter.grad = None if gradient is None else gradient * self.factor
