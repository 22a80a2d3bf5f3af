"""Does the optimizer hold, and move, every trainable parameter? Runs the case's own step in one process.

Whatever steps is seen, by torch's global hooks: one optimizer, several, or a wrapper of some. Does not judge
whether an update is right, only that there is one.
"""

from __future__ import annotations

from typing import Any

from pytest_gputrain.case import TrainingCase
from pytest_gputrain.checks.context import CheckContext
from pytest_gputrain.checks.finite import parameters_are_finite
from pytest_gputrain.checks.optimizer_book import Book, changed, snapshot
from pytest_gputrain.checks.ranks import alone
from pytest_gputrain.checks.registry import check
from pytest_gputrain.checks.result import CheckFailed, Figures

STEPS = 5
# A loss scaler skips the optimizer's first steps until its scale fits.
PATIENT_STEPS = 20


@check("optimizer_covers", subject="gradient flow")
def check_optimizer_covers(case: TrainingCase, ctx: CheckContext) -> Figures:
    """Fails for a trainable parameter that no optimizer holds, that two hold, or that never moves."""
    figures: Figures = alone(_watch, case, ctx, doing="taking training steps in one process")
    return figures


def _watch(case: TrainingCase, ctx: CheckContext) -> Figures:
    """In the rank: five steps, more while the optimizer has not stepped."""
    from pytest_gputrain.checks.session import build_alone, draw_batch, seed_for, take_step
    from pytest_gputrain.trace.names import named_parameters, owners
    from pytest_gputrain.trace.optimizers import OptimizerWatch, optimizers_in
    from pytest_gputrain.trace.steps import patched_backward

    model = build_alone(case, ctx)
    optimizer = case.optimizer(model)
    book = Book(named_parameters(model))
    trainable = [name for name, parameter in book.parameters.items() if parameter.requires_grad]
    for inner in optimizers_in(optimizer):
        book.hold(inner)
    steps = 0
    while steps < STEPS or (book.updates < STEPS and steps < PATIENT_STEPS):
        batch = draw_batch(case, ctx, steps)
        before = snapshot(book.parameters)
        book.begin_step()
        watch = OptimizerWatch(optimizer, book.before_update, book.after_update)
        with watch, patched_backward(book.after_backward):
            take_step(case, model, optimizer, [batch], seed_for(ctx, steps))
        book.moved |= changed(before, book.parameters)
        parameters_are_finite(model, steps, book.broken)
        _judge_new(model, optimizer, book, steps)
        steps += 1
    _judge_hidden(model, book)
    return _judge(book, trainable, owners(model), steps)


def _judge(book: Book, trainable: list[str], owned_by: dict[str, Any], steps: int) -> Figures:
    from pytest_gputrain.trace.gradients import describe_missing

    total, figures = len(trainable), {"parameters": len(trainable), "steps": steps}
    # By hand or by a wrapper that tells nothing: then moving is the only evidence.
    moved = book.moved_in_update if book.torch_updates else book.moved
    if not book.updates and not book.moved:
        raise CheckFailed(
            f"no optimizer stepped in {steps} steps: the case's step never calls optimizer.step()", figures
        )
    alien = [name for name in trainable if name not in book.held and name not in moved]
    if alien:
        raise CheckFailed(
            f"{len(alien)} of {total} trainable parameters are in no optimizer group: "
            f"{describe_missing(alien, owned_by)}\n  likely: {_why_missing(book, alien)}",
            {**figures, "missing": alien},
        )
    if book.updates and book.cleared and not book.pushed:
        raise CheckFailed(
            f"gradients arrive in {steps} steps, but every one is cleared before the optimizer steps\n"
            "  likely: zero_grad() between backward() and optimizer.step()",
            figures,
        )
    twice = [name for name in trainable if name in book.twice]
    if twice:
        who = " and ".join(book.twice[twice[0]])
        raise CheckFailed(
            f"{len(twice)} of {total} trainable parameters are updated twice a step, by {who}: "
            f"{describe_missing(twice, owned_by)}",
            {**figures, "twice": twice},
        )
    still = [name for name in trainable if name in book.pushed and name not in book.moved]
    stuck = [name for name in still if name in book.beyond_rounding or book.rates.get(name) == 0.0]
    if stuck:
        raise CheckFailed(
            f"{len(stuck)} of {total} trainable parameters never moved in {steps} steps, though their "
            f"gradient is not zero: {describe_missing(stuck, owned_by)}\n  likely: {_why_still(book, stuck)}",
            {**figures, "stuck": stuck},
        )
    return {**figures, "lost_in_rounding": still, "notes": _notes(book, still)}


def _judge_new(model: Any, optimizer: Any, book: Book, step: int) -> None:
    """A module that is replaced while training has parameters that the optimizer never saw."""
    from pytest_gputrain.trace.gradients import describe_missing
    from pytest_gputrain.trace.names import named_parameters, owners
    from pytest_gputrain.trace.optimizers import optimizers_in, parameters_of

    inners = optimizers_in(optimizer)
    if not inners:
        return  # it does not say what it holds
    known = {id(parameter) for inner in inners for parameter in parameters_of(inner)}
    known |= {id(parameter) for parameter in book.outside} | set(book.names)
    alien = [
        name
        for name, parameter in named_parameters(model).items()
        if parameter.requires_grad and parameter.grad is not None and id(parameter) not in known
    ]
    if alien:
        raise CheckFailed(
            f"{len(alien)} parameters were replaced in step {step}, get gradients, and are in no optimizer "
            f"group: {describe_missing(alien, owners(model))}\n"
            "  likely: a module is made anew after the optimizer was built; keep it, or build the optimizer "
            "after it",
            {"new": alien},
        )


def _judge_hidden(model: Any, book: Book) -> None:
    """A layer in a plain list computes and gets gradients, and nothing ever updates, moves or saves it."""
    from pytest_gputrain.trace.names import hidden_parameters

    held = {id(parameter) for parameter in book.outside}
    trained = [
        name
        for name, parameter in hidden_parameters(model).items()
        if parameter.grad is not None and id(parameter) not in held
    ]
    if trained:
        shown = ", ".join(trained[:5]) + (f" and {len(trained) - 5} more" if len(trained) > 5 else "")
        raise CheckFailed(
            f"{len(trained)} parameter(s) get gradients, but are not registered in the model and in no "
            f"optimizer group: {shown}\n  likely: modules in a Python list or dict; use nn.ModuleList, "
            "nn.ModuleDict or nn.ParameterList",
            {"hidden": trained},
        )


def _why_missing(book: Book, alien: list[str]) -> str:
    shapes = {tuple(book.parameters[name].shape) for name in alien}
    if shapes & {tuple(parameter.shape) for parameter in book.outside}:
        return (
            "the optimizer holds other tensors of the same shape, which are not this model's: it was built "
            "over a copy, or before the model's modules were replaced"
        )
    return "the groups were made by a filter that leaves them out, or before these modules were added"


def _why_still(book: Book, stuck: list[str]) -> str:
    if all(book.rates.get(name) == 0.0 for name in stuck):
        return "their group's learning rate is 0 in every step"
    return "the optimizer's step leaves them out, or something restores them after it"


def _notes(book: Book, lost: list[str]) -> list[str]:
    if not lost:
        return []
    kinds = sorted({str(book.parameters[name].dtype).removeprefix("torch.") for name in lost})
    return [
        f"{len(lost)} parameters did not move because the update is below their precision "
        f"({', '.join(kinds)}): {', '.join(lost[:5])}"
    ]
