"""Windows of one lab against the full batch: what each should give, and what is wrong where it does not."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from pytest_gputrain.case import TrainingCase, pytree
from pytest_gputrain.case.loading import describe
from pytest_gputrain.checks.accumulation_lab import TINY, Lab
from pytest_gputrain.checks.accumulation_plan import Plan, Trial, names_of, plain, plan, shares
from pytest_gputrain.checks.accumulation_runs import run_window
from pytest_gputrain.checks.accumulation_sums import Gap, Tolerance, gap, joined, norm, sizes, weights_in
from pytest_gputrain.checks.accumulation_window import Gradients, Window
from pytest_gputrain.checks.accumulation_words import SAME, Weights, is_sum, sum_words, why_steps, words
from pytest_gputrain.checks.context import CheckContext
from pytest_gputrain.checks.result import CheckFailed, CheckSkipped, Figures

THIRD = 1.0 / 3.0  # no power of two: every product with it rounds
# What the same run may differ by from itself; beyond that nothing can be judged.
NOT_REPEATABLE = 0.05


@dataclass
class Judge:
    """All windows in one lab. once: the factor that the step has on the case's own loss, if it has one."""

    case: TrainingCase
    ctx: CheckContext
    lab: Lab
    mixing: bool = False
    worst: float = 0.0
    compared: int = 0
    notes: list[str] = field(default_factory=list)
    once: float | None = None

    def judge(self) -> None:
        self.plan: Plan = plan(self.case, self.lab, self.ctx.batch_size)
        self.notes += self.plan.notes
        self.dtype = self.lab.precision()[1]
        self.factor = 1.0 if self.dtype == "float16" else TINY
        self.full = self.lab.window([self.plan.full], self.factor)
        self.own_full = self._own()
        self.tolerance = self._measure()
        self.once = self._once()
        if self.once is not None and abs(self.once - 1) > SAME:
            self.notes.append(f"the step's gradients are {self.once:.4g} x those of the case's loss")
        for trial in self.plan.trials:
            self._judge_trial(trial)
        self._judge_unscaled()

    def figures(self) -> Figures:
        return {
            "precision": self.dtype,
            "micro-batches": sorted({1, *(trial.num for trial in self.plan.trials)}),
            "samples": self.plan.num_samples,
            "parameters": self.compared,
            "worst": self.worst,
            "tolerance": self.tolerance.relative,
        }

    def _own(self) -> Gradients | None:
        """Of the case's loss on the full batch, with the step's random numbers; None if it has no use."""
        try:
            return self.lab.own([self.plan.full], states=self.full.states)[0][0]
        except Exception as error:
            self.notes.append(
                f"compared with itself only, because loss(model, batch) raised {describe(error)}"
            )
            return None

    def _measure(self) -> Tolerance:
        """What running again, and a factor that changes nothing, do to the gradients."""
        again = self.lab.window([self.plan.full], self.factor).gradients
        scaled = self.lab.window([self.plan.full], self.factor * THIRD).gradients
        size = norm(self.full.gradients)
        if not size:
            raise CheckSkipped("no gradient reaches the optimizer here, so there is nothing to compare")
        twin = norm(joined([again, self.full.gradients], [1.0, -1.0])) / size
        third = norm(joined([scaled, self.full.gradients], [1.0 / THIRD, -1.0])) / size
        if twin > NOT_REPEATABLE:
            raise CheckSkipped(
                f"the same step, batch and seed give gradients that differ by {twin:.0%}, so nothing can be "
                "compared; draw all randomness from torch's default generator"
            )
        if third > NOT_REPEATABLE and self.factor != 1.0:
            # Something does not grow with the loss (a decay added to gradients), and hides the rest here.
            self.factor = 1.0
            self.full = self.lab.window([self.plan.full])
        return Tolerance.measured(third if twin < third < NOT_REPEATABLE else twin, self.dtype)

    def _once(self) -> float | None:
        if self.own_full is None:
            return None
        found = self._gap(self.full.gradients, joined([self.own_full], [self.factor]))
        if found.closed:
            return 1.0
        ratio = found.ratio
        if not 0 < abs(ratio) < float("inf"):
            return None
        scaled = self._gap(self.full.gradients, joined([self.own_full], [self.factor * ratio]))
        return ratio if scaled.closed else None

    def _gap(self, seen: Gradients, expected: Gradients, size: dict[str, float] | None = None) -> Gap:
        return gap(seen, expected, self.tolerance, size or {})

    def _judge_trial(self, trial: Trial) -> None:
        window = run_window(self.lab, trial.parts, self.factor)
        self._judge_steps(trial, window)
        if trial.is_split:
            whole = self._gap(window.gradients, self.full.gradients)
            if whole.closed:
                self._count(whole)
                return
        due = shares(self.case, trial.parts)
        base, found = self._closest(trial, window, due)
        if not found.closed:
            self._judge_uneven(trial, window, base, due, found)
        elif trial.is_split:
            self._judge_mixing(trial, base, due)
        self._count(found)

    def _count(self, found: Gap) -> None:
        self.worst, self.compared = max(self.worst, found.error), max(self.compared, found.compared)

    def _judge_steps(self, trial: Trial, window: Window) -> None:
        usual = self.full.most_steps
        if window.most_steps >= 2 * max(1, usual):
            raise CheckFailed(
                f"the optimizer steps {window.most_steps} times in a window of {trial.num} micro-batches, "
                f"and {usual} on one{': there is no accumulation' if usual else ''}\n"
                f"  likely: {why_steps(usual)}"
            )

    def _closest(self, trial: Trial, window: Window, due: Sequence[float]) -> tuple[list[Gradients], Gap]:
        """The parts' gradients, by the case's loss or the step on each alone, and the gap they leave."""
        tried: list[tuple[list[Gradients], Gap]] = []
        if self.once is not None:
            own, _ = self.lab.own(trial.parts, states=window.states)
            base = [joined([part], [self.once * self.factor]) for part in own]
            tried.append((base, self._gap(window.gradients, joined(base, due), sizes(base, due))))
            if tried[0][1].closed:
                return tried[0]
        alone = [each.gradients for each in self.lab.apart(trial.parts, self.factor, window.states)]
        tried.append((alone, self._gap(window.gradients, joined(alone, due), sizes(alone, due))))
        return next((each for each in tried if each[1].closed), tried[0])

    def _judge_uneven(
        self, trial: Trial, window: Window, base: list[Gradients], due: Sequence[float], found: Gap
    ) -> None:
        """Raises CheckFailed, but for a last micro-batch that is smaller and counts as much as the others."""
        if not trial.even and self.case.loss_reduction == "mean":
            weights = plain(self.case, trial.parts)
            if self._gap(window.gradients, joined(base, weights), sizes(base, weights)).closed:
                counts = ", ".join(str(pytree.batch_length(part)) for part in trial.parts)
                self.notes.append(
                    f"micro-batches of {counts} samples count the same; weigh them, or drop "
                    "a smaller last one"
                )
                return
        self._fail(window.gradients, base, trial, due, found)

    def _judge_mixing(self, trial: Trial, base: list[Gradients], due: Sequence[float]) -> None:
        """Pieces that cannot make up the whole, or only with other weights than the step's?"""
        had, _ = weights_in(self.full.gradients, base)
        if min(had) < 0 or not self._gap(self.full.gradients, joined(base, had), sizes(base, had)).closed:
            self.mixing = True
            return
        found = self._gap(joined(base, due), self.full.gradients)
        if not found.closed:
            counts, unit = self._counts(trial)
            listed = ", ".join(f"{weight:.3f}" for weight in had)
            even = ", ".join(f"{weight:.3f}" for weight in due)
            wrong = f"({len(found.wrong)} of {found.compared} parameters)"
            if is_sum(had):
                raise CheckFailed(sum_words(trial.num, even, wrong), {"counts": counts, "unit": unit})
            raise CheckFailed(
                f"tokens are averaged naively: in the full batch's loss the {trial.num} micro-batches count "
                f"{listed}, in the step {even} {wrong}\n"
                "  likely: the loss is a mean over targets, of which micro-batches have different "
                "numbers; give "
                "the case loss_reduction='token_mean' with num_targets, and weigh by them",
                {"counts": counts, "unit": unit},
            )

    def _judge_unscaled(self) -> None:
        """What does not grow with the loss (a decay added to gradients) shows at the loss's own scale."""
        trial = self.plan.trials[0]
        if self.mixing or self.factor == 1.0:
            return
        once, many = self.lab.window([self.plan.full]), run_window(self.lab, trial.parts, 1.0)
        found = self._gap(many.gradients, once.gradients)
        if not found.closed:
            named = names_of(found.wrong, self._owners())
            raise CheckFailed(
                f"gradients of {trial.num} micro-batches are not those of the full batch "
                f"({len(found.wrong)} of "
                f"{found.compared} parameters): {named}; with a tiny loss they are\n"
                "  likely: gradients are clipped, or something that does not grow with the loss is added to "
                "them, for every micro-batch"
            )

    def _fail(
        self, seen: Gradients, base: list[Gradients], trial: Trial, due: Sequence[float], found: Gap
    ) -> None:
        had, left = weights_in(seen, base)
        counts, unit = self._counts(trial)
        weights = Weights(had, due, left, counts, unit, self.once, self.tolerance.relative)
        text = words(weights, found, names_of(found.wrong, self._owners()))
        raise CheckFailed(
            text,
            {
                "micro-batches": trial.num,
                "weights": [round(weight, 6) for weight in had],
                "wrong": len(found.wrong),
            },
        )

    def _counts(self, trial: Trial) -> tuple[list[int], str]:
        if self.case.loss_reduction == "token_mean":
            assert callable(self.case.num_targets)
            return [int(self.case.num_targets(part)) for part in trial.parts], "targets"
        return [pytree.batch_length(part) or 0 for part in trial.parts], "samples"

    def _owners(self) -> dict[str, Any]:
        from pytest_gputrain.trace.names import owners

        return owners(self.lab.model())
