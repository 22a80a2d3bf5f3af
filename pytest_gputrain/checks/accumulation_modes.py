"""The body of ``accumulation_parity``, in a rank: in training mode, and in eval mode if that cannot tell."""

from __future__ import annotations

from pytest_gputrain.case import TrainingCase
from pytest_gputrain.case.loading import describe
from pytest_gputrain.checks.accumulation_judge import Judge
from pytest_gputrain.checks.accumulation_lab import Lab
from pytest_gputrain.checks.accumulation_runs import best_lab
from pytest_gputrain.checks.accumulation_sums import gap
from pytest_gputrain.checks.context import CheckContext
from pytest_gputrain.checks.result import CheckFailed, Figures

SEEDS = 4  # a coin of a few sides may fall alike


def judge(case: TrainingCase, ctx: CheckContext) -> Figures:
    """Raises CheckFailed for gradients that are not those of the full batch."""
    from pytest_gputrain.checks.accumulation_native import compare_native

    lab = best_lab(case, ctx)
    training = Judge(case, ctx, lab)
    training.judge()
    notes = training.notes
    if training.mixing:
        notes.append(_cause(training))
        quiet = _quiet(case, ctx, lab, notes)
        if quiet is not None and quiet.mixing:
            notes.append("in eval mode too, pieces of a batch give other gradients than the whole")
    figures = training.figures()
    if lab.double and not training.mixing and training.own_full is not None:
        figures.update(compare_native(case, ctx, training))
    return {**figures, "notes": list(dict.fromkeys(notes))}


def _quiet(case: TrainingCase, ctx: CheckContext, lab: Lab, notes: list[str]) -> Judge | None:
    try:
        judge = Judge(case, ctx, Lab(case, ctx, double=lab.double, quiet=True))
        judge.judge()
    except CheckFailed as error:
        raise CheckFailed(f"{error.message}\n  in eval mode, without which it could not be seen") from None
    except Exception as error:
        notes.append(f"not compared in eval mode: {describe(error)}")
        return None
    notes.append("in eval mode the pieces were compared with the whole")
    return judge


def _cause(judge: Judge) -> str:
    """Why pieces of a batch rightly give other gradients than the whole."""
    modules = list(judge.lab.model().modules())
    found = []
    if any("BatchNorm" in type(module).__name__ for module in modules):
        found.append("BatchNorm normalises each micro-batch by its own statistics")
    if any("Dropout" in type(module).__name__ and getattr(module, "p", 1) for module in modules):
        found.append("dropout draws another mask for each micro-batch")
    if not found and _is_random(judge):
        found.append("the model draws random numbers (router noise, stochastic depth, dropout)")
    if not found:
        found.append(
            "samples of a batch depend on each other (a contrastive loss, expert capacity, an "
            "auxiliary loss over "
            "the batch, a buffer that forward writes)"
        )
    return (
        f"micro-batches rightly give other gradients than the full batch: {' and '.join(found)}; "
        "compared with "
        "what each gives alone"
    )


def _is_random(judge: Judge) -> bool:
    try:
        first, *others = (judge.lab.own([judge.plan.full], draw=draw)[0][0] for draw in range(SEEDS))
    except Exception:
        return False
    return any(not gap(other, first, judge.tolerance, {}).closed for other in others)
